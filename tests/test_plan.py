"""From a config to a plan: what is refused, before and after compiling."""

import jax
import pytest

from rope_lm import loop
from rope_lm import plan as plans
from rope_lm.refusal import Refusal
from tests.runs import small


@pytest.fixture
def config(text, cache) -> dict:
    return small(text, cache)


@pytest.mark.parametrize(
    "section, change, words",
    [
        (None, {"stpes": 3}, "unknown key in the config 'stpes': did you mean steps"),
        (None, {"steps": 0}, "steps=0: must be at least 1"),
        (None, {"steps": 2**31}, "steps=2147483648: must be at least 1 and below 2..31"),
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
        ("model", {"heads": 16}, "the head size 1 is odd"),
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
        loop.train(config, tmp_path / "run", {})
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_too_little_memory_is_refused_before_compiling_where_the_state_tells(config, monkeypatch):
    planned = plans.draft(config)
    state = planned.program.abstract
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.moments)))
    needs = arrays + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params)) // 2
    monkeypatch.setattr(plans, "capacity", lambda _: needs - 1)
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    with pytest.raises(Refusal, match=r"the state of training needs 0\.0 GB on one device of .* lower model.width or"):
        plans.plan(config)


def test_too_little_memory_for_a_step_is_refused_once_it_is_compiled(config, tmp_path, monkeypatch):
    compiled = plans.plan(config).compiled
    assert 0 < compiled.evaluate_bytes < compiled.step_bytes and compiled.seconds > 0
    monkeypatch.setattr(plans, "capacity", lambda _: compiled.step_bytes - 1)
    with pytest.raises(
        Refusal, match=r"a step needs .* lower data.batch \(4\) or data.length \(16\), .* than 2 members"
    ):
        loop.train(config, tmp_path / "run", {})
    assert not (tmp_path / "run" / "config.json").exists(), "another config may take its place"


def test_capacity_is_what_a_device_has_of_this_machine(monkeypatch):
    monkeypatch.setattr(plans.machine, "memory", lambda: 1000)
    assert plans.capacity(jax.devices()[0]) == 1000 // jax.local_device_count()
