"""Checks the shapes and types of every public signature while the tests run, and leaves the slow tests to --all."""

import gc
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile many small programs and run each a few times. Without XLA's optimizations that takes a third less
# time. What .ci/run trains with the scripts is optimized as usual.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from jaxtyping import install_import_hook

# An int is a float too (PEP 484).
install_import_hook("rope_lm", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("here", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("here")

# Compiled programs are kept from one test, and one run of the tests, to the next.
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir(), f"rope_lm-tests-{os.getuid()}")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# The tests marked `all` run under --all only; one line at the end says which were left.

LEFT = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every test, including those marked `all`")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    left = [item for item in items if item.get_closest_marker("all")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not item.get_closest_marker("all")]
    config.stash[LEFT] = Counter(item.path.stem.removeprefix("test_") for item in left)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = dict(session.config.stash[LEFT])


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's: only its workers collect
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT] = Counter(getattr(node, "workeroutput", {}).get("left", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left := config.stash[LEFT]:
        files = ", ".join(f"{name} {count}" for name, count in left.most_common())
        terminalreporter.write_line(f"left to ./scripts/test.sh --all: {left.total()} tests ({files})")


MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def programs() -> Iterator[None]:
    """Drop compiled programs before there are too many.

    On Linux a process may map 65,530 pieces of memory, every compiled program takes some, and XLA aborts without.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of prepared text, for the whole session."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text in one file: 2,000 different lines."""
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text(
        "".join(f"line {i} says that {i} squared is {i * i}, and its digits are {i:08b}\n" for i in range(2000))
    )
    return path
