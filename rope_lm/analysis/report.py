"""The report: summary.json, runs.json, tables, figures and one self-contained page."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rope_lm.analysis import archive, figures, page, tables
from rope_lm.analysis.findings import Findings
from rope_lm.analysis.summary import finite, summarize


def write(findings: Findings, out: Path) -> dict[str, Any]:
    """Write the report into the folder `out` and return its summary.

    The folder is then an archive: `load_all` reads it in place of the runs, and a report on it is the same report.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawings = dict(_draw(findings, out / "figures"))
    summary = summarize(findings)
    _write_json(summary, out / "summary.json", indent=1)
    _write_json(archive.pack(findings.sweeps), out / "runs.json", indent=None)
    tables.write(findings, out)
    (out / "index.html").write_text(page.render(findings, drawings), encoding="utf-8")
    return summary


def _write_json(value: Any, path: Path, indent: int | None) -> None:
    path.write_text(json.dumps(finite(value), indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def _draw(findings: Findings, folder: Path) -> Iterator[tuple[str, str]]:
    """Write the figures, and yield their names and SVG for the page."""
    folder.mkdir(exist_ok=True)
    for name, figure in figures.of(findings):
        figures.save(figure, folder / name)
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        # Drawings share one page, so ids are made unique.
        svg = svg[svg.index("<svg") :].replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
        yield name, svg.replace('xlink:href="#', f'xlink:href="#{name}-')
