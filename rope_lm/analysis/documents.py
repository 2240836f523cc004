"""The tables in README.md and docs/, computed from the archives in results/ and kept between two markers.

<!-- table: quick -->
...
<!-- end -->
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rope_lm import migrate
from rope_lm.analysis.tables import BOUNDS
from rope_lm.refusal import Refusal, unknown

Tree = Mapping[str, Any]

REGION = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
CELLS = ("causal-softmax", "masked-softmax", "causal-performer", "masked-performer")  # settings of `replication`
LATE = " (added after its runs began)"


def pages(root: Path) -> list[Path]:
    """Return the pages that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(text: str, root: Path) -> str:
    """Return a page with every table recomputed from the archives under `root`.

    Raises Refusal for a table that does not exist, and for an archive that cannot be read.
    """

    def table(region: re.Match[str]) -> str:
        start, name, end = region.groups()
        if name not in TABLES:
            raise unknown("table", name, TABLES)
        return start + TABLES[name](root / "results") + end

    return REGION.sub(table, text)


def read(path: Path) -> Tree:
    """Return the JSON object in a file of an archive. Raises Refusal if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{str(path)!r} cannot be read ({error}): give the file of a report or a benchmark") from error


def summary(path: Path) -> Tree:
    """Return a report's summary.json with current keys, whichever version wrote it."""
    return migrate.summary(read(path))


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    lines.insert(1, "|" + "---|" * len(heads))
    return "\n".join(lines) + "\n"


def estimate(value: Tree, digits: int) -> str:
    """Return a mean with its 95% interval, marked if it is a bound."""
    mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{BOUNDS[value.get('bound', '')]}{mean} [{low}, {high}]"


def ordered(arms: Iterable[Tree], settings: Sequence[str]) -> list[Tree]:
    """Return the arms of the settings, in the order of the settings."""
    return sorted((arm for arm in arms if arm["setting"] in settings), key=lambda arm: settings.index(arm["setting"]))


def name(arm: Tree) -> str:
    """Return the name of an arm within its setting."""
    return arm["arm"].rpartition("/")[2]


def comparison(results: Path, *, archive: str, settings: Sequence[str] = ("",), more: Sequence[str] = ()) -> str:
    """Tabulate the arms of an archive, best first within each setting; `more` names columns of MORE."""
    several = len(settings) > 1
    heads = ["encoding", "final nats/token [95%]", *more, "speed-up of rotary over it [95%]", "rotary faster?"]
    rows = []
    for arm in ordered(summary(results / archive / "summary.json")["arms"], settings):
        over = arm["speedup"]
        verdict = [estimate(over, 2), over["verdict"]] if over else ["", ""]
        cells = [name(arm), estimate(arm["final_nats"], 3), *(MORE[column](arm) for column in more), *verdict]
        rows.append([arm["setting"]] * several + cells)
    return markdown(["setting"] * several + heads, rows)


MORE: dict[str, Callable[[Tree], str]] = {
    "bits/byte": lambda arm: f"{arm['bits_per_byte']:.3f}",
    "tokens/s": lambda arm: f"{arm['tokens_per_second']:,.0f}",
    "learning rate": lambda arm: f"{arm['learning_rate']:g}",
}


def claims(results: Path, *, archive: str) -> str:
    """Tabulate the claims that an archive gives verdicts on."""
    rows = []
    for found in summary(results / archive / "summary.json")["claims"]:
        claim, nats = found["claim"], " nats" * (found["claim"]["outcome"] == "final")
        rows.append(
            [
                found["sentence"],
                claim["setting"],
                f"{claim['source']}: {claim['published']}",
                estimate(found, 2) + nats,
                f"{found['p_holm']:.2g}",
                found["verdict"] + LATE * found["late"],
            ]
        )
    return markdown(("claim", "setting", "source: published", "measured here [95%]", "p (Holm)", "verdict"), rows)


def rates(results: Path, *, archive: str) -> str:
    """Tabulate the final loss at each learning rate of a grid; an arm's best rate is bold."""
    found = summary(results / archive / "summary.json")["tuning"]
    grid = sorted({rate for tuning in found for rate in tuning["learning_rates"]})
    several = len({tuning["setting"] for tuning in found}) > 1
    rows = []
    for tuning in found:
        finals = dict(zip(tuning["learning_rates"], tuning["final_nats"], strict=True))
        shown = {rate: "diverged" if nats is None else f"{nats:.3f}" for rate, nats in finals.items()}
        shown[tuning["best"]] = f"**{shown[tuning['best']]}**"
        rows.append([tuning["setting"]] * several + [tuning["arm"], *(shown.get(rate, "") for rate in grid)])
    return markdown(["setting"] * several + ["encoding", *(f"{rate:g}" for rate in grid)], rows)


def longer(results: Path, *, archive: str, length: int, scaling: str) -> str:
    """Tabulate the loss in text longer than the trained `length`: all arms as trained, and rotary with a `scaling`."""
    arms = [arm for arm in summary(results / archive / "summary.json")["arms"] if arm["beyond"]]
    multiples = sorted({row["multiple"] for arm in arms for row in arm["beyond"]})
    rows = []
    for arm in arms:
        for kind in ("", scaling):
            losses = {row["multiple"]: row["apart"] for row in arm["beyond"] if row["scaling"] == kind}
            cells = [f"{_mean(losses[m]):.3f}" if m in losses else "" if kind else "refused" for m in multiples]
            rows += [[name(arm) + f" read as {kind}" * bool(kind), *cells]] if losses else []
    heads = [f"{length * multiple:,}" + " (trained)" * (multiple == 1) for multiple in multiples]
    return markdown(["read at once, tokens", *heads], rows)


def encodings(results: Path) -> str:
    """Tabulate every encoding from the archive of their sweep."""
    folder = results / "encodings"
    return encoding_table(
        summary(folder / "summary.json"),
        read(folder / "benchmark.json"),
        read(results.parent / "tests" / "goldens" / "index.json"),
        read(folder / "shift_invariant.json"),
    )


def encoding_table(report: Tree, benchmark: Tree, goldens: Tree, invariant: Mapping[str, bool]) -> str:
    """Tabulate each encoding's reference implementation, cost, loss, and loss in longer text.

    `invariant` maps each encoding to True if shifting all positions changes nothing.
    """
    arms = {arm["encoding"]: arm for arm in report["arms"]}
    costs = {row["encoding"]: row.get("overhead") for row in benchmark["rows"] if row["scale"] == "tiny"}
    sources = {golden["position"]["name"]: golden["source"] for golden in reversed(goldens["goldens"].values())}
    heads = ("encoding", "compared with", "shift-invariant", "own parameters", "step over none", "final nats", "at 4x")
    rows = []
    for encoding, stays in invariant.items():
        arm, cost = arms.get(encoding), None if encoding == "none" else costs.get(encoding)
        rows.append(
            [
                encoding,
                ", ".join(sources.get(encoding, "").split(", ")[:2]).split("(")[0].strip(),  # package, file
                "yes" if stays else "no",
                f"{arm['parameters_position']:,}" if arm else "",
                "" if cost is None else f"{100 * cost:+.1f}%",
                f"{arm['final_nats']['mean']:.3f}" if arm else "",
                _lengthened(arm["beyond"]) if arm else "",
            ]
        )
    return markdown(heads, rows)


def _lengthened(rows: Iterable[Tree]) -> str:
    """Return the change in loss when four times the trained length is read at once."""
    mean = {row["multiple"]: _mean(row["apart"]) for row in rows if not row["scaling"]}
    return f"{mean[4] - mean[1]:+.2f}" if {1, 4} <= mean.keys() else "refused" if 1 in mean else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def speeds(results: Path, *, path: str) -> str:
    """Tabulate the rows of a benchmark's JSON file."""
    heads = (
        "encoding",
        "compile s",
        "step ms",
        "tokens/s",
        "of matmul peak",
        "over none",
        "MB",
        "decoding, ms a token",
    )
    rows = []
    for row in read(results / path)["rows"]:
        over = row.get("overhead")
        rows.append(
            [
                row["encoding"],
                f"{row['compile_seconds']:.1f}",
                f"{1e3 * row['step_seconds']:.1f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{100 * row['utilization']:.0f}%",
                "" if over is None or row["encoding"] == "none" else f"{100 * over:+.1f}%",
                f"{row['peak_bytes'] / 1e6:,.0f}",
                f"{1e3 * row['token_seconds']:.2f}",
            ]
        )
    return markdown(heads, rows)


def overheads(results: Path, *, path: str, scale: str) -> str:
    """Tabulate a benchmark's measurements of rotary alone: host time, ensembles, depths, lengths."""
    found = read(results / path)[scale]
    rows = [
        ("the host waits for data", f"{100 * found['host']['data_wait_share']:.2f}% of the time"),
        (
            "logging and saving",
            f"{100 * found['bookkeeping']['bookkeeping_share']:.2f}% of {found['bookkeeping']['steps']} steps",
        ),
    ]
    for row in found["depths"]:
        rows.append((f"compiling {row['layers']} layers", f"{row['compile_seconds']:.1f} s"))
    for row in found["ensembles"][1:]:
        rows.append((f"{row['members']} members", f"{row['over_in_turn']:.2f} of the time of as many runs in turn"))
    for key, attention in (("lengths", "softmax"), ("lengths_performer", "Performer")):
        for row in found[key]:
            cost = f"{1e6 * row['seconds_per_token']:.0f} us"
            rows.append((f"a token in a row of {row['length']:,}, {attention} attention", cost))
    return markdown(("measured", "result"), rows)


BRIEF = ("bits/byte",)
WIDTHS = ("width32", "width64", "width96", "width128")
AMPLITUDES = ("scale0_02", "scale0_1", "scale1")
TABLES: dict[str, Callable[[Path], str]] = {
    "quick": partial(comparison, archive="quick", more=("bits/byte", "tokens/s", "learning rate")),
    "quick_brief": partial(comparison, archive="quick", more=BRIEF),
    "quick_h200": partial(comparison, archive="quick_h200", more=BRIEF),
    "replication": partial(comparison, archive="replication", settings=CELLS),
    "replication_claims": partial(claims, archive="replication"),
    "sizes": partial(comparison, archive="sizes", settings=WIDTHS),
    "sizes_claims": partial(claims, archive="sizes"),
    "embedding_scale": partial(comparison, archive="embedding_scale", settings=AMPLITUDES),
    "embedding_scale_claims": partial(claims, archive="embedding_scale"),
    "tuning": partial(rates, archive="tuning"),
    "tuned": partial(rates, archive="tuned"),
    "longer": partial(longer, archive="quick", length=128, scaling="yarn"),
    "encodings": encodings,
    "benchmark": partial(speeds, path="benchmark/benchmark.json"),
    "benchmark_rotary": partial(overheads, path="benchmark/benchmark.json", scale="tiny"),
    "benchmark_h200": partial(speeds, path="benchmark_h200/benchmark.json"),
    "benchmark_h200_bytes": partial(speeds, path="benchmark_h200/bytes.json"),
}
