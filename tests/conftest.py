"""Shapes and types of every public signature are checked while the tests run."""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile a thousand small programs and run each a few times: a third less is spent on them in all. What .ci/run
# trains by the scripts is compiled as everywhere.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from jaxtyping import install_import_hook

# A whole number is a float too (PEP 484).
install_import_hook("rope_lm", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("here", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("here")

# Compiled programs are kept from one test, and one run of the tests, to the next.
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir(), f"rope_lm-tests-{os.getuid()}")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def programs() -> Iterator[None]:
    """Dropped before there are too many: on Linux a process may map 65,530 pieces of memory, and every compiled program
    is some of them (after some 500 tests XLA aborted)."""
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
