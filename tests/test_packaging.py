"""The package: what is required and locked, how it is set up, what is cited."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_house import SOURCES, imported

ROOT = Path(__file__).parents[1]


def test_requirements_name_every_package_that_the_code_imports():
    known = importlib.metadata.packages_distributions()

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    named = {normal(line.split("#")[0].strip()) for line in (ROOT / "requirements.in").read_text().splitlines() if line}
    own = {"rope_lm", "configs", "scripts", "tests"}
    for path in SOURCES:
        for name in {module.split(".")[0] for module in imported(path)} - own - set(sys.stdlib_module_names):
            assert {normal(package) for package in known[name]} & named, f"{path.name} imports {name}"


def test_every_package_is_installed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [folder for name in ("rope_lm", "configs", "scripts") for folder in (ROOT / name).rglob("__init__.py")]
    assert sorted(packages) == sorted(".".join(path.parent.relative_to(ROOT).parts) for path in found)


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


@pytest.mark.all
def test_setting_up_again_follows_a_python_that_has_become_another_version(tmp_path):
    """The locks are empty here, so that only pip is installed, which venv brings."""
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
