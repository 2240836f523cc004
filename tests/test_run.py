"""A run from config to run directory, in this process: what it writes, how it goes on, what it refuses."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import lm
from rope_lm import journal, run
from rope_lm.checkpoint import Checkpoints
from rope_lm.refusal import Refusal
from scripts import entry

PROVENANCE = journal.provenance(["test"], {})


@pytest.fixture
def config(text, cache) -> dict:
    config = lm.get_config(f"position=rotary,data=text:{text}")
    config.steps, config.seeds = 12, (0, 1)
    config.every.update({"evaluate": 4, "save": 5, "log": 2})
    config.data.update({"length": 16, "batch": 4, "validation_rows": 6, "cache": cache})
    config.model.update({"width": 16, "heads": 2, "layers": 1, "hidden": 32})
    return entry.plain(config)


def rows(workdir: Path) -> dict:
    """The last row of every (split, member, step)."""
    return {(row["split"], row["member"], row["step"]): row for row in journal.read_rows(workdir / "metrics.jsonl")}


def parameters(workdir: Path, config: dict) -> tuple[int, list[np.ndarray]]:
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        step, state, _ = checkpoints.restore(run.plan(config).program.abstract)
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_a_run_writes_what_the_report_reads(config, tmp_path):
    status = run.train(config, tmp_path, PROVENANCE)
    assert status["status"] == "finished" and status["step"] == 12
    found = rows(tmp_path)
    assert {step for split, _, step in found if split == "validation"} == {0, 4, 8, 12}
    assert {step for split, _, step in found if split == "train"} == {2, 4, 6, 8, 10, 12}
    assert {member for _, member, _ in found} == {0, 1}
    last = found["validation", 1, 12]
    assert last["tokens"] == 6 * 16 and last["nats"] < found["validation", 1, 0]["nats"]
    assert last["bits_per_byte"] == pytest.approx(last["nats"] / math.log(2), rel=0.01)
    train = found["train", 0, 12]
    assert train["tokens"] == 4 * 16 and train["tokens_per_second"] > 0 and 0 <= train["learning_rate"] < 3e-3
    seconds = [found["train", 0, step]["seconds"] for step in range(2, 13, 2)]
    assert seconds == sorted(seconds) and seconds[0] > 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["kernel"] == "blocked" and manifest["precision"] == "float32" and manifest["compile_seconds"] > 0
    assert (
        manifest["parameters"] == 2 * 257 * 16 + 4 * 16 * 16 + 2 * 16 * 32 + 3 * 16 and manifest["flops_per_token"] > 0
    )
    assert manifest["members"] == [{"member": i, "seed": i, "learning_rate": 3e-3} for i in (0, 1)]
    assert parameters(tmp_path, config)[0] == 12


def test_a_finished_run_is_not_run_again(config, tmp_path):
    run.train(config, tmp_path, PROVENANCE)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run.train(config, tmp_path, PROVENANCE)["status"] == "finished"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_deterministic_is_recorded_and_its_options_are_known_to_xla(config, tmp_path):
    run.train(config, tmp_path, PROVENANCE, deterministic=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["deterministic"] == manifest["segments"][0]["deterministic"] == {}, "a CPU needs no telling"
    assert run.compiler_options("gpu", False) is None
    double = jax.jit(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((), "float32"))
    assert double.compile(run.compiler_options("gpu", True))(np.float32(3)) == 6
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        double.compile({"xla_gpu_deterministic": True})


def test_more_steps_go_on_from_the_end(config, tmp_path):
    config["optimizer"] = {**config["optimizer"], "schedule": "constant"}
    run.train(config, tmp_path / "parts", PROVENANCE)
    run.train({**config, "steps": 20}, tmp_path / "parts", PROVENANCE)
    run.train({**config, "steps": 20}, tmp_path / "whole", PROVENANCE)
    a, b = parameters(tmp_path / "whole", config), parameters(tmp_path / "parts", config)
    assert a[0] == b[0] == 20
    warm = [np.abs(x - y).max() for x, y in zip(a[1], b[1], strict=True)]
    assert max(warm) < 0.05, "the warm-up is a fraction of the steps: near, not the same"


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_fewer_steps_than_are_done_are_refused_and_nothing_is_written(config, tmp_path, status):
    run.train(config, tmp_path, PROVENANCE)
    said = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(said | {"status": status}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    with pytest.raises(Refusal, match=r"steps=8: the run in .* is at step 12 already: give at least 12, or"):
        run.train({**config, "steps": 8}, tmp_path, PROVENANCE)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}


def test_a_crash_is_recorded_and_its_cause_is_raised(config, tmp_path, monkeypatch):
    def fail(self):
        raise MemoryError("no memory for this")

    monkeypatch.setattr(run.Loop, "_validate", fail)
    with pytest.raises(MemoryError):
        run.train(config, tmp_path, PROVENANCE)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed" and status["why"] == "MemoryError: no memory for this"


@pytest.mark.parametrize(
    "section, change, words",
    [
        (None, {"stpes": 3}, "unknown key in the config 'stpes': did you mean steps"),
        (None, {"steps": 0}, "steps=0: must be at least 1"),
        (None, {"steps": True}, "config.steps=True: must be a whole number"),
        (None, {"steps": None}, "config.steps=None: must be a whole number"),
        (None, {"seeds": (1, 1)}, "equal seeds are the same run twice"),
        (None, {"seeds": (-1,)}, "each must be at least 0"),
        (None, {"model": 3}, "config lacks the section model"),
        ("every", {"save": 0}, "every.save=0: must be at least 1, in steps"),
        ("data", {"batch": True}, "data.batch=True: must be a whole number"),
        ("data", {"name": "stdlb"}, "unknown data 'stdlb': did you mean stdlib"),
        ("data", {"length": 50000}, "the training text has .* rows of 50000 tokens, a batch needs 4"),
        ("model", {"heads": 3}, "model.width=16 is not divisible by model.heads=3"),
        ("model", {"heads": 16}, "head size 16/16 = 1 is odd"),
        ("model", {"embedding_scale": float("nan")}, "model.embedding_scale=nan: must be a finite number"),
        ("model", {"attention": {"name": "softmax", "kernel": "cudnn"}}, "model.attention.kernel=cudnn runs on NVIDIA"),
        ("model", {"position": {"name": "rotery", "base": 1e4}}, "unknown model.position.name 'rotery'"),
        ("model", {"position": {"name": "learned", "limit": 8, "scale": 1.0}}, "encodes indices below 8"),
        ("optimizer", {"learning_rate": ("fast",)}, "optimizer.learning_rate=.*each a finite number"),
        ("mesh", {"data": 3}, "mesh .*asks for 3 devices"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written_or_compiled(
    config, tmp_path, section, change, words, monkeypatch
):
    def never(*_: object, **__: object):
        raise AssertionError("it compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", never)
    config = {**config, **change} if section is None else {**config, section: {**config[section], **change}}
    with pytest.raises(Refusal, match=words) as refusal:
        run.train(config, tmp_path / "run", PROVENANCE)
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_members_on_devices_of_their_own_are_told_to_attention(config, monkeypatch):
    class Told(Exception):
        pass

    def resolve(*given):
        raise Told(given[-1])

    def make(member: int, data: int, fsdp: int, tensor: int) -> SimpleNamespace:
        return SimpleNamespace(shape={"member": 2}, devices=np.array(jax.devices()[:1]))

    monkeypatch.setattr(run.sharding, "make", make)
    monkeypatch.setattr(run.attention, "resolve", resolve)
    with pytest.raises(Told) as told:
        run.draft(config)
    assert told.value.args == (2,)
