"""The house: what imports what, what is locked, what a formatter says."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rope_lm.analysis.tables import BOUNDS

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("rope_lm", "configs", "scripts") for path in (ROOT / folder).rglob("*.py"))

# Imports go down only: a room may import those on lower floors, and those beside it that are named before it here.
FLOORS = [
    ["refusal"],
    ["settings", "positions", "execution", "machine"],
    ["positional"],
    ["data", "attention", "objective", "optimizer", "sharding"],
    ["block"],
    ["transformer"],
    ["training", "journal"],
    ["checkpoint", "progress", "shares"],
    ["run"],
    ["launch", "analysis", "benchmark", "verification", "trained", "interop"],
    ["generate", "extrapolation", "probing", "distance"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it, by its full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_down_only():
    for path in (ROOT / "rope_lm").rglob("*.py"):
        room = path.relative_to(ROOT / "rope_lm").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imported(path):
            other = name.split(".")[1] if name.startswith("rope_lm.") else None
            assert other is None or other == room or FLOOR[other] < FLOOR[room], f"{path.name} imports {name}"


def test_text_and_model_never_meet():
    for path in (ROOT / "rope_lm" / "data").rglob("*.py"):
        assert not any(name.startswith(("jax", "flax", "rope_lm.transformer")) for name in imported(path)), path


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("rope_lm", ("ml_collections", "absl", "tensorflow.", "torch", "clu", "configs", "pickle")),
        ("rope_lm/analysis", ("jax", "flax", "pickle")),
        ("configs", ("jax", "flax", "numpy", "absl")),
        ("scripts", ("tensorflow.", "torch", "pickle")),
    ],
)
def test_what_a_folder_does_not_import(folder, forbidden):
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            assert not any(name == each.rstrip(".") or name.startswith(each.rstrip(".") + ".") for each in forbidden), (
                path
            )


def test_requirements_name_every_package_that_the_code_imports():
    known = importlib.metadata.packages_distributions()
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    named = {normal(line.split("#")[0].strip()) for line in (ROOT / "requirements.in").read_text().splitlines() if line}
    own = {"rope_lm", "configs", "scripts", "tests"}
    for path in SOURCES:
        for name in {each.split(".")[0] for each in imported(path)} - own - set(sys.stdlib_module_names):
            assert {normal(each) for each in known[name]} & named, f"{path.name} imports {name}"


@pytest.mark.parametrize("kind", ["", "-dev", "-cuda", "-tpu"])
def test_locks_are_exact_hashed_and_complete(kind):
    lock = (ROOT / f"requirements{kind}.txt").read_text()
    pins = dict(re.findall(r"^([a-z0-9-]+)(?:\[[a-z0-9]+\])?==([^ ;\\]+)", lock, re.MULTILINE))
    assert lock.count("--hash=sha256:") > len(pins) > 30 and "://" not in lock
    for line in (ROOT / f"requirements{kind}.in").read_text().splitlines():
        name = re.sub(r"\[.*", "", line.split("#")[0].strip()).lower().replace("_", "-")
        assert not name or name.startswith("-r") or name in pins, name
    base = dict(re.findall(r"^([a-z0-9-]+)==([^ ;\\]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert all(pins[name] == version for name, version in base.items() if name in pins), "one version everywhere"


def test_the_formatter_and_the_linter_have_nothing_to_say():
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_parse_and_can_be_run():
    for path in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        assert path.stat().st_mode & 0o111, path


def test_setting_up_again_follows_a_python_that_has_become_another_version(tmp_path):
    """The locks are empty here: what is installed is pip alone, which venv brings."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    for kind in ("", "-cuda", "-tpu"):
        (tmp_path / f"requirements{kind}.txt").touch()
    (library,) = _set_up(tmp_path).glob("lib/python*")
    (tmp_path / ".venv" / "kept").touch()
    assert (_set_up(tmp_path) / "kept").exists(), "the second time it is as it was"
    library.rename(library.with_name("python3.0"))  # that of the version before
    (again,) = _set_up(tmp_path).glob("lib/python*")
    assert again == library


def _set_up(root: Path) -> Path:
    subprocess.run([root / "scripts" / "setup.sh"], check=True, capture_output=True)
    return root / ".venv"


def test_the_citation_names_what_a_citation_needs():
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(cited)
    assert f'version = "{cited["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_every_public_function_says_what_it_does():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if tree.body:
            assert ast.get_docstring(tree) or path.name == "__init__.py", path
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and node.name != "main":
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_readme_shows_the_archived_numbers():
    import json

    readme = (ROOT / "README.md").read_text()
    summary = json.loads((ROOT / "results" / "quick" / "summary.json").read_text())
    results = readme.split("## What came out")[1].split("\n## ")[0]
    rows = {line.split("|")[1].strip(): line for line in results.splitlines() if line.startswith("| ")}
    for arm in summary["arms"]:
        final, over, row = arm["final_nats"], arm["speedup_of_rotary"], rows[arm["arm"]]
        assert f"{final['mean']:.3f} [{final['low']:.3f}, {final['high']:.3f}]" in row, arm["arm"]
        assert f"{arm['tokens_per_second']:,.0f}" in row and f"{arm['rate']:g}" in row, arm["arm"]
        if over:
            assert f"{over['mean']:.2f} [{over['low']:.2f}, {over['high']:.2f}]" in row and over["verdict"] in row
    found = readme.split("## The claim in the settings it was made in")[1].split("\n## ")[0]
    summary = json.loads((ROOT / "results" / "replication" / "summary.json").read_text())
    assert len(summary["arms"]) == 20
    for arm in summary["arms"]:
        final, over, name = arm["final_nats"], arm["speedup_of_rotary"], arm["arm"].rpartition("/")[2]
        row = next(line for line in found.splitlines() if line.startswith(f"| {arm['setting']} | {name} |"))
        assert f"{final['mean']:.3f} [{final['low']:.3f}, {final['high']:.3f}]" in row, row
        if over:
            assert f"{over['mean']:.2f} [{over['low']:.2f}, {over['high']:.2f}]" in row and over["verdict"] in row, row
    for claim in summary["claims"]:
        measured = f"| {BOUNDS[claim['bound']]}{claim['mean']:.2f} [{claim['low']:.2f}, {claim['high']:.2f}]"
        row = next(
            line for line in found.splitlines() if claim["sentence"] in line and claim["claim"]["setting"] in line
        )
        assert measured in row and claim["verdict"] in row, row
    for path in re.findall(r"\]\(([^)h][^)]*)\)", readme):
        assert (ROOT / path).exists(), path


def test_the_readmes_notebook_runs():
    lines = (ROOT / "README.md").read_text().split("From a notebook")[1].split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "('rotary', 1.127" in done.stdout, done.stderr
