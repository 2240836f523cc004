"""The environment of a process: what is pinned, what is recorded, who says it."""

import json

import jax
import numpy as np
import pytest

from rope_lm import environment, run_directory, sharding, training
from rope_lm.refusal import Refusal
from tests.commands import call
from tests.programs import config, program, start
from tests.test_run_directory import CONFIG, MANIFEST, ran

HOSTILE = {
    "jax_enable_x64": True,
    "jax_default_matmul_precision": "bfloat16",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_disable_jit": True,
}


def leaves(program: training.Program) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(start(program, (3,)).params)]


def test_a_program_is_the_same_whatever_jax_was_told_before():
    usual = leaves(program("learned"))
    for name, value in HOSTILE.items():
        jax.config.update(name, value)
        assert environment.PINNED[name] != value
    found = program("learned")
    assert {leaf.dtype for leaf in jax.tree.leaves(found.abstract.params)} == {np.dtype("float32")}
    for a, b in zip(usual, leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in HOSTILE:
        value = getattr(jax.config, name)
        assert getattr(value, "value", value) == environment.PINNED[name], name


def test_a_context_that_changes_a_pinned_setting_is_refused():
    with jax.enable_x64(True), pytest.raises(Refusal, match="jax_enable_x64 is True in a context of the calling"):
        training.specify(config("none"), vocabulary=257, members=1, mesh=jax.make_mesh((1,) * 4, ("a", "b", "c", "d")))


@pytest.mark.parametrize("variable, value, kept", [
    ("JAX_ENABLE_X64", "1", None),  # pinned
    ("JAX_DEFAULT_DTYPE_BITS", "32", None),
    ("JAX_PLATFORMS", "cpu", None),  # the device is recorded
    ("JAX_COMPILATION_CACHE_DIR", "/a", None),
    ("NVIDIA_TF32_OVERRIDE", "0", "0"),
    ("JAX_SOFTMAX_CUSTOM_JVP", "1", "1"),
    ("CUBLAS_WORKSPACE_CONFIG", ":4096:8", ":4096:8"),
    ("NPROC", "2", "2"),
    ("HOME", "/root", None),
    ("XLA_FLAGS", "--xla_gpu_b=1 --xla_cpu_a=false --xla_dump_to=/x", "--xla_cpu_a=false --xla_gpu_b=1"),
    ("XLA_FLAGS", "--xla_force_host_platform_device_count=8", None),
])  # fmt: skip
def test_variables_that_may_change_numbers_are_recorded(variable, value, kept, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert environment.recorded().get(variable) == kept


def test_a_run_that_goes_on_says_what_changed_in_the_environment(tmp_path, capfd):
    ran(tmp_path)
    now = MANIFEST | {"environment": {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}}
    with run_directory.RunDirectory(tmp_path, CONFIG, now) as run:
        run.begin(1, {})
    was = MANIFEST["environment"].get("XLA_FLAGS")
    assert f"environment.XLA_FLAGS changed from {was} to --xla_gpu_autotune_level=0" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["segments"][-1]["environment"]  # as in earlier versions
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with run_directory.RunDirectory(tmp_path, CONFIG, MANIFEST) as run:
        run.begin(1, {})
    assert "environment" not in capfd.readouterr().err


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_a_platform_that_is_not_here_is_named(error, monkeypatch):
    def fail() -> list:
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(Refusal, match=r"JAX_PLATFORMS=cpu: there is no such device here.*: unset it"):
        program("none", mesh=sharding.make(1, -1, 1, 1))


@pytest.mark.all
def test_a_platform_that_is_not_here_is_one_line(tmp_path):
    done = call("scripts.train", "--config=configs/lm.py:data=probe:copy", "--dry", env={"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2 and done.stderr.startswith("error: JAX_PLATFORMS=cuda: there is no such device here")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.all
def test_a_run_is_the_same_whatever_jax_is_told_by_the_environment(text, cache, tmp_path):
    flags = [
        "steps=1",
        "every.log=1",
        "data.length=16",
        "data.batch=4",
        "data.validation_rows=4",
        f"data.cache={cache}",
    ]
    words = ["scripts.train", f"--config=configs/lm.py:data=text:{text}", *(f"--config.{flag}" for flag in flags)]
    hostile = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
    hostile |= {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_NUMPY_RANK_PROMOTION": "raise", "NVIDIA_TF32_OVERRIDE": "1"}
    for name, env in (("a", {}), ("b", hostile)):
        done = call(*words, f"--workdir={tmp_path / name}", env=env)
        assert done.returncode == 0, done.stderr
    a, b = (run_directory.read_rows(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert [row["nats"] for row in a] == [row["nats"] for row in b] and len(a) >= 3
    found = [run_directory.read_json(tmp_path / name / "manifest.json")["environment"] for name in "ab"]
    assert run_directory.differences(*found) == [("NVIDIA_TF32_OVERRIDE", None, "1")]
