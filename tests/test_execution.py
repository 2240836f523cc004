"""Decisions for a platform, and that they change losses by rounding only."""

import re
from functools import cache

import numpy as np
import pytest

from rope_lm import execution, positional, training
from rope_lm.execution import Execution
from rope_lm.positional import Effects, Shape
from rope_lm.refusal import Refusal
from tests.models import position
from tests.programs import config, program, rows, train

ALONE = {"member": 1, "data": 1, "fsdp": 1, "tensor": 1}
NONE = Effects(bias=False, score=False, features=False, relative_norms=False, head_size=64)


def choose(
    platform: str, effects: Effects = NONE, mesh: dict | None = None, deterministic: bool = False, **changes: object
) -> Execution:
    """Choose for a config of two layers; `changes` are those of its sections model, data and optimizer."""
    sections = config("none", batch=16, length=256)
    sections["model"]["attention"] = {"name": "softmax", "kernel": "auto"}
    for key, value in changes.items():
        (section,) = (name for name in ("model", "data", "optimizer") if key in sections[name])
        sections[section][key] = value
    sizes = ALONE | (mesh or {})
    return execution.choose(sections, effects, platform=platform, mesh=sizes, deterministic=deterministic)


@pytest.mark.parametrize("platform, data, batch, accumulation_steps, length, pieces", [
    ("cpu", 1, 16, 1, 256, 8),  # scale tiny on one device: two rows at once
    ("cpu", 2, 16, 1, 256, 4),  # and on two
    ("cpu", 2, 16, 1, 128, 2),  # scale nano
    ("cpu", 2, 16, 1, 512, 8),  # rows are not cut
    ("cpu", 1, 9, 1, 256, 3),  # every piece has as many rows
    ("cpu", 1, 16, 2, 256, 8),  # a piece that was asked for is cut again
    ("cpu", 1, 4, 1, 8, 1),
    ("gpu", 1, 16, 1, 256, 1),
    ("gpu", 1, 16, 4, 256, 4),
])  # fmt: skip
def test_a_cpu_works_on_at_least_512_tokens_at_once(platform, data, batch, accumulation_steps, length, pieces):
    sizes = {"batch": batch, "accumulation_steps": accumulation_steps, "length": length}
    assert choose(platform, mesh={"data": data}, **sizes).pieces == pieces


@pytest.mark.parametrize("platform, member, layers, remat, biased, in_turn, unroll", [
    ("cpu", 1, 4, "products", False, True, True),
    ("cpu", 1, 5, "products", False, True, False),
    ("cpu", 1, 4, "full", False, True, False),
    ("cpu", 2, 4, "products", False, False, True),
    ("gpu", 1, 12, "products", False, False, True),
    ("gpu", 1, 13, "products", False, False, False),
    ("gpu", 1, 12, "full", False, False, False),
    ("gpu", 1, 4, "products", True, True, True),  # cuDNN adds one bias to all rows
    ("gpu", 2, 4, "products", True, False, True),
    ("tpu", 1, 4, "products", False, False, False),
])  # fmt: skip
def test_members_and_layers(platform, member, layers, remat, biased, in_turn, unroll):
    sizes = {"layers": layers, "remat": remat, "dtype": "bfloat16"}
    chosen = choose(platform, NONE._replace(bias=biased), {"member": member}, **sizes)
    assert (chosen.members_in_turn, chosen.unroll) == (in_turn, unroll)


def test_compiler_options():
    assert choose("gpu", deterministic=True).compiler_options == {"xla_gpu_deterministic_ops": True}
    assert choose("gpu").compiler_options == choose("cpu", deterministic=True).compiler_options == {}
    assert choose("cpu").init_options == {"xla_backend_optimization_level": 1} and choose("gpu").init_options == {}


@pytest.mark.parametrize("platform, dtype, name, head_size, kernel", [
    ("cpu", "float32", "none", 64, "blocked"),
    ("cpu", "float32", "cope", 64, "blocked"),
    ("cpu", "bfloat16", "fire", 64, "blocked"),
    ("cpu", "bfloat16", "none", 20, "blocked"),
    ("gpu", "bfloat16", "rotary", 64, "cudnn"),
    ("gpu", "bfloat16", "none", 128, "cudnn"),
    ("gpu", "bfloat16", "none", 136, "xla"),
    ("gpu", "bfloat16", "none", 20, "xla"),
    ("gpu", "bfloat16", "alibi", 64, "cudnn"),
    ("gpu", "bfloat16", "shaw", 64, "xla"),
    ("gpu", "float32", "none", 64, "xla"),
    ("tpu", "bfloat16", "none", 64, "xla"),
])  # fmt: skip
def test_one_kernel_for_each_platform_encoding_and_head_size(platform, dtype, name, head_size, kernel):
    shape = Shape(width=4 * head_size, heads=4, head_size=head_size, layers=2, causal=True)
    effects = positional.effects(position(name), shape)
    assert choose(platform, effects, dtype=dtype).kernel == kernel


@pytest.mark.parametrize("changes, member, taken", [
    ({}, 2, True),
    ({"bias": True}, 1, True),
    ({"bias": True}, 2, False),  # members on devices of their own have a bias each
    ({"score": True}, 1, False),  # depends on content, so every row has its own
])  # fmt: skip
def test_cudnn_takes_one_bias_for_all_rows(changes, member, taken):
    effects = NONE._replace(**changes)

    def kernel(wanted: str) -> str:
        attention = {"name": "softmax", "kernel": wanted}
        return choose("gpu", effects, {"member": member}, dtype="bfloat16", attention=attention).kernel

    assert kernel("auto") == ("cudnn" if taken else "xla")
    if not taken:
        with pytest.raises(Refusal, match="one bias to the logits of all rows, not on gpu in bfloat16 with many: cho"):
            kernel("cudnn")


@pytest.mark.parametrize("platform, dtype, head_size, kernel, words", [
    ("cpu", "bfloat16", 64, "cudnn", "kernel=cudnn runs on NVIDIA GPUs in bfloat16 .*, not on cpu in bfloat16: choose"),
    ("gpu", "float32", 64, "cudnn", "not on gpu in float32: choose auto, xla or blocked"),
    ("gpu", "bfloat16", 136, "cudnn", "a multiple of 8 and at most 128, here it is 136: choose auto or xla"),
    ("cpu", "float32", 64, "blockd", "unknown model.attention.kernel 'blockd': did you mean blocked"),
])  # fmt: skip
def test_a_kernel_that_cannot_run_is_refused(platform, dtype, head_size, kernel, words):
    attention = {"name": "softmax", "kernel": kernel}
    with pytest.raises(Refusal, match=words):
        choose(platform, NONE._replace(head_size=head_size), dtype=dtype, attention=attention)


def test_the_kernel_of_attention_with_one_implementation_is_its_name():
    attention = {"name": "performer", "features": 16, "redraw": 3, "block": 8}
    assert choose("gpu", dtype="bfloat16", attention=attention).kernel == "performer"


# --- the program ------------------------------------------------------------------------------------------------------


@cache
def usual() -> tuple[training.Program, str, np.ndarray]:
    return _run(program("rotary", 2))


def _run(found: training.Program) -> tuple[training.Program, str, np.ndarray]:
    """A program, its compiled step and the losses of three steps."""
    batch = np.stack([rows(0, 0), rows(1, 0)])
    text = found.step.lower(found.abstract, batch).compile().as_text()
    return found, text, train(found, (0, 1), 3)[1]


@pytest.mark.parametrize("change, tolerance", [
    ({"pieces": 4}, 1e-4),
    pytest.param({"members_in_turn": False}, 1e-4, marks=pytest.mark.all),
    pytest.param({"unroll": False}, 1e-5, marks=pytest.mark.all),
    pytest.param({"kernel": "xla"}, 1e-5, marks=pytest.mark.all),
])  # fmt: skip
def test_a_decision_changes_the_program_and_its_losses_by_rounding_only(change, tolerance, monkeypatch):
    found, text, losses = usual()
    choose = execution.choose
    monkeypatch.setattr(execution, "choose", lambda *args, **kwargs: choose(*args, **kwargs)._replace(**change))
    other, other_text, same = _run(program("rotary", 2))
    assert found.execution != other.execution == found.execution._replace(**change)
    assert text != other_text
    np.testing.assert_allclose(same, losses, atol=tolerance)


@pytest.mark.all
@pytest.mark.parametrize("name", ["rotary", "xpos"])
def test_angles_are_computed_once_in_unrolled_layers_and_pieces(name):
    """Products of a compiled step are as many as without an encoding."""

    def products(name: str) -> int:
        found = program(name, optimizer={"accumulation_steps": 2})
        assert found.execution.unroll and found.execution.pieces == 2
        compiled = found.step.lower(found.abstract, rows(0, 0)[None]).compile()
        return len(re.findall(r"= f32\[[\d,]+\]\S* dot\(", compiled.as_text()))

    assert products(name) == products("none") > 20
