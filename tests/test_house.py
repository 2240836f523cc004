"""The rules of the house (docs/extending.md): functions, English, imports, types, format."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("rope_lm", "configs", "scripts") for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "rope_lm")]

# The rooms of rope_lm, floor by floor. A room imports those on lower floors, and those named before it on its own.
FLOORS = [
    ["refusal", "settings", "machine", "environment", "signals", "positions", "kernels", "positional"],
    ["data", "attention", "block", "transformer", "objective", "optimizer", "sharding", "execution"],
    ["training", "costs", "migrate", "tensorboard", "progress", "provenance", "run_directory", "checkpoint"],
    ["plan", "timing", "loop", "sweep", "analysis", "interop"],
    ["trained", "generate", "extrapolation", "probing", "distance", "verification", "benchmark"],
]
ORDER = {room: number for number, room in enumerate(room for floor in FLOORS for room in floor)}

# A config section is the keyword arguments of one function, so these have as many parameters as their section has keys.
BOUND_BY_A_SECTION = {"rope_lm.transformer.Transformer.__init__", "rope_lm.optimizer.adamw", "rope_lm.data.make"}
# A decorator that passes on whatever its function takes.
PASSES_ON_KEYWORDS = {"rope_lm.transformer.traced"}

CLUMSY = re.compile(r"(What|Of|By|How|Whether|Whom|Those)\b")


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def definitions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Every function and class of a file, however deep, by its name in the module or class that holds it."""

    def visit(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield f"{inside}.{child.name}", child
            yield from visit(child, f"{inside}.{child.name}" if isinstance(child, ast.ClassDef) else inside)

    return visit(ast.parse(path.read_text()), name_of(path))


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in SOURCES:
        for name, node in definitions(path):
            if isinstance(node, ast.FunctionDef):
                yield name, node


def imported(path: Path) -> set[str]:
    """The full name of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_function_is_longer_than_60_lines():
    long = {name: lines for name, node in functions() if (lines := node.end_lineno - node.lineno + 1) > 60}
    assert not long


def test_no_function_has_more_than_7_parameters_or_hides_them():
    many, hidden = {}, []
    for name, node in functions():
        parameters = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        if (count := len(set(parameters) - {"self", "cls"})) > 7:
            many[name] = count
        if node.args.kwarg:
            hidden.append(name)
    assert many.keys() == BOUND_BY_A_SECTION, many
    assert set(hidden) == PASSES_ON_KEYWORDS


def test_no_lambda_has_a_name():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)
            assert not (named and isinstance(node.value, ast.Lambda)), f"{path}:{node.lineno}: use def"


def test_docstrings_begin_with_a_verb_or_a_noun():
    clumsy = []
    for path in SOURCES:
        nodes = [(name_of(path), ast.parse(path.read_text())), *definitions(path)]
        clumsy += [
            f"{name}: {text[:60]}" for name, node in nodes if CLUMSY.match(text := ast.get_docstring(node) or "")
        ]
    assert not clumsy


def test_every_module_and_every_public_name_has_a_docstring():
    bare = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            bare.append(name_of(path))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and node.name != "main" and not ast.get_docstring(node):
                bare.append(f"{name_of(path)}.{node.name}")
    assert not bare


def test_nothing_hangs_on_anything():
    """It depends on it."""
    written = [*SOURCES, *(ROOT / "tests").rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for path in written:
        found = re.search(r"\bhang(s|ing)?\s+on\b", path.read_text())
        assert not found, f"{path}: {found.group()}"


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_no_room_is_for_odds_and_ends():
    assert not [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_imports_go_down_only():
    upward = []
    for path in LIBRARY:
        room = path.relative_to(ROOT / "rope_lm").parts[0].removesuffix(".py")
        if room != "__init__":
            rooms = {name.split(".")[1] for name in imported(path) if name.startswith("rope_lm.")} - {room}
            upward += [f"{name_of(path)} imports {other}" for other in rooms if ORDER[other] >= ORDER[room]]
    assert not upward


def test_every_room_has_its_floor():
    rooms = {path.relative_to(ROOT / "rope_lm").parts[0].removesuffix(".py") for path in LIBRARY} - {"__init__"}
    assert rooms == set(ORDER)


def test_no_modules_import_each_other_in_a_circle():
    modules = {name_of(path) for path in SOURCES}
    graph = {}
    for path in SOURCES:
        names = {name if name in modules else name.rpartition(".")[0] for name in imported(path)}
        graph[name_of(path)] = names & modules - {name_of(path)}
    graphlib.TopologicalSorter(graph).prepare()


def test_text_and_model_never_meet():
    for path in (ROOT / "rope_lm" / "data").rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] in ("jax", "flax")], path


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("rope_lm", ["ml_collections", "absl", "tensorflow", "torch", "clu", "configs", "scripts", "pickle"]),
        ("rope_lm/analysis", ["jax", "flax"]),
        ("configs", ["jax", "flax", "numpy", "absl"]),
        ("scripts", ["tensorflow", "torch", "pickle"]),
    ],
)
def test_some_folders_never_import_some_packages(folder, forbidden):
    for path in (ROOT / folder).rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & set(forbidden), path


def test_configs_sweeps_and_the_analysis_load_without_jax():
    rooms = (ROOT / "configs", ROOT / "rope_lm" / "sweep", ROOT / "rope_lm" / "analysis")
    names = [name_of(path) for path in SOURCES if any(path.is_relative_to(room) for room in rooms)]
    assert len(names) > 20
    code = f"import {', '.join(names)}, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", ["ruff format --check .", "ruff check .", "mypy"])
def test_the_formatter_the_linter_and_the_type_checker_have_nothing_to_say(command):
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_hooks_run_the_formatter_the_linter_and_the_type_checker():
    import yaml

    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].split() for hook in repo["hooks"]]
    assert [entry[:2] for entry in entries] == [
        [".venv/bin/ruff", "format"],
        [".venv/bin/ruff", "check"],
        [".venv/bin/mypy"],
    ]


def test_shell_scripts_parse_and_can_be_run():
    assert shutil.which("bash")
    for path in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        assert path.stat().st_mode & 0o111, path
