"""README.md and docs/: tables equal the archives, and whatever a page names exists."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from rope_lm import migrate
from rope_lm.analysis import documents
from rope_lm.refusal import Refusal
from scripts import tables

ROOT = Path(__file__).parents[1]
PAGES = documents.pages(ROOT)
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
OURS = ("python -m scripts.", "python -m tests.")
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def commands(text: str) -> list[list[str]]:
    """The module and the arguments of every command on a page, in code blocks and in sentences."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    lines += [" ".join(words.split()) for words in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith(OURS)]


@page
def test_every_table_equals_its_archive(page):
    text = page.read_text()
    assert documents.fill(text, ROOT) == text, "run python -m scripts.tables"
    assert text.count("<!-- table:") == text.count("<!-- end -->") == len(documents.REGION.findall(text))


def test_every_table_is_shown():
    shown = {name for path in PAGES for _, name, _ in documents.REGION.findall(path.read_text())}
    assert shown == set(documents.TABLES)


def test_a_changed_number_is_found_and_mended(monkeypatch, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    for folder in ("results", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text().replace("1.127 [1.110", "1.126 [1.110"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    for flags, status, words in (["--check"], 1, "out of date"), ([], 0, "rewritten"), (["--check"], 0, ""):
        monkeypatch.setattr(sys, "argv", ["tables", *flags])
        assert tables.main() == status
        assert words in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_an_unknown_table_and_a_missing_archive_are_refused(tmp_path):
    with pytest.raises(Refusal, match="unknown table 'quik': did you mean quick"):
        documents.fill("<!-- table: quik -->\n<!-- end -->", ROOT)
    with pytest.raises(Refusal, match=r"summary\.json' cannot be read"):
        documents.fill("<!-- table: quick -->\n<!-- end -->", tmp_path)


def test_archives_with_older_and_with_newer_keys_give_the_same_table(tmp_path):
    old = (ROOT / "results" / "quick" / "summary.json").read_text()
    new = old.replace('"rate":', '"learning_rate":').replace('"rates":', '"learning_rates":')
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "summary.json").write_text(new.replace('"speedup_of_rotary":', '"speedup":'))
    for name in ("quick", "quick_brief"):
        assert documents.TABLES[name](tmp_path) == documents.TABLES[name](ROOT / "results")
    assert documents.rates(tmp_path, archive="quick") == documents.rates(ROOT / "results", archive="quick")


def test_the_archive_of_shift_invariance_says_what_the_laws_prove():
    from tests.positional.test_laws import CLAIMS

    archived = documents.read(ROOT / "results" / "encodings" / "shift_invariant.json")
    assert len(archived) >= 25
    assert archived == {name: CLAIMS[name].shift_invariant for name in archived}


@pytest.mark.all
def test_the_command_of_encodings_prints_the_table_of_the_page_and_writes_its_files(monkeypatch, tmp_path, capsys):
    """Shift invariance, which takes a model of each, is measured for two; for the others it is the archive's."""
    from scripts import encodings

    archived = documents.read(ROOT / "results" / "encodings" / "shift_invariant.json")
    measured = encodings.shift_invariant
    some = ("rotary", "sinusoidal")
    monkeypatch.setattr(encodings, "shift_invariant", lambda name: (measured if name in some else archived.get)(name))
    monkeypatch.setattr(sys, "argv", ["encodings", f"--out={tmp_path}"])
    assert encodings.main() == 0
    assert capsys.readouterr().out.startswith(documents.TABLES["encodings"](ROOT / "results"))
    assert archived.items() <= documents.read(tmp_path / "shift_invariant.json").items()
    assert {path.name for path in tmp_path.iterdir()} == {"decay.svg", "decay.png", "shift_invariant.json"}


@page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target).exists(), target


@page
def test_every_command_exists(page):
    """The script, its flags, its config and each key that it changes. A slash names a flag's alternatives."""
    for script, *words in commands(page.read_text()):
        source = (ROOT / f"{script.replace('.', '/')}.py").read_text()
        config = next((word.partition("=")[2] for word in words if word.startswith("--config=")), "")
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("--config."):
                assert reachable(config, flag.removeprefix("--config.")), word
            elif flag.startswith("--"):
                assert f'"{flag}"' in source or f'("{flag[2:]}"' in source or flag == "--help", f"{script} {word}"
        if config and "config.json" not in config:
            made(config)


def made(config: str):
    """The config that a flag --config names."""
    path, _, text = config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return module.get_config(text) if text else module.get_config()


def reachable(config: str, key: str) -> bool:
    value = made(config)
    for part in key.split("."):
        if part not in value:
            return False
        value = value[part]
    return True


def test_the_renamed_keys_are_those_that_are_migrated():
    text = (ROOT / "docs" / "method.md").read_text().split("## Renamed config keys")[1]
    assert dict(re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", text, re.MULTILINE)) == migrate.CONFIG
    added = {f"{section}.{key}" for section, keys in migrate.ADDED.items() for key in keys}
    assert set(re.findall(r"`([\w.]+)` \(`", text)) == added


@page
def test_every_test_that_a_page_names_exists(page):
    text = page.read_text()
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
    for path, name in re.findall(r"scripts/test\.sh (tests/[\w/.]+)(?: -k (\w+))?", text):
        assert (ROOT / path).exists(), path
        assert not name or name in (ROOT / path).read_text(), f"{path} -k {name}"


def test_every_claim_of_the_page_on_rotary_names_a_listed_test():
    text, tests = (ROOT / "docs" / "rotary.md").read_text().split("## The tests")
    listed = set(re.findall(r"^\| \[(\d+)\]", tests, re.MULTILINE))
    assert set(re.findall(r"\[(\d+)\]", text)) == listed


def test_the_map_shows_every_room():
    """Of the library: each module and folder, and nothing that is not there."""
    block = (ROOT / "README.md").read_text().split("## A map")[1].split("```")[1]
    shown = re.findall(r"^  (\w+(?:\.py|/)) ", block, re.MULTILINE)
    rooms = [path.name for path in (ROOT / "rope_lm").glob("*.py") if path.name != "__init__.py"]
    rooms += [f"{path.name}/" for path in (ROOT / "rope_lm").iterdir() if (path / "__init__.py").exists()]
    assert sorted(shown) == sorted(rooms)


def test_the_notebook_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = (ROOT / "docs" / "running.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "docs/running.md", "exec"), {})
    assert "('rotary', 1.127" in capsys.readouterr().out


def test_the_example_of_an_encoding_works():
    import jax.numpy as jnp
    from flax import nnx

    from rope_lm.positional import bias
    from rope_lm.positions import View, contiguous

    text = (ROOT / "docs" / "extending.md").read_text().split("   ```python\n")[1].split("   ```")[0]
    names = dict(vars(bias))
    exec(re.sub(r"^   ", "", text, flags=re.MULTILINE), names)
    shape = bias.Shape(width=8, heads=2, head_size=4, layers=1, causal=True)
    made = names["Linear"](0.5, shape=shape, rngs=nnx.Rngs(0)).bias(View(contiguous(3), contiguous(3), causal=True))
    distance = jnp.arange(3)[:, None] - jnp.arange(3)
    assert jnp.allclose(made, -0.5 * distance)


def test_the_figures_are_those_that_the_command_draws(monkeypatch, tmp_path):
    """Byte for byte in two runs here; as drawn numbers, to 0.01 points, on a machine whose last bits differ."""
    from scripts import figures

    for run in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["figures", f"--out={tmp_path / run}"])
        assert figures.main() == 0
    archived = sorted((ROOT / "docs" / "figures").glob("*.svg"))
    assert [path.name for path in archived] == sorted(path.name for path in (tmp_path / "first").iterdir())
    for path in archived:
        drawn, again = ((tmp_path / run / path.name).read_text() for run in ("first", "second"))
        assert drawn == again
        (ours, shape), (theirs, expected) = map(numbers_and_rest, (drawn, path.read_text()))
        assert shape == expected
        assert ours == pytest.approx(theirs, abs=0.01)


def numbers_and_rest(svg: str) -> tuple[list[float], str]:
    """The numbers that a drawing has, and the rest of it, without colours and names that are hashes."""
    bare = re.sub(r'#\w+|"[mp][0-9a-f]{10}"', "", svg)
    return [float(number) for number in NUMBER.findall(bare)], NUMBER.sub("", bare)
