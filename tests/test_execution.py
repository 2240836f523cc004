"""How a platform runs a program: what is chosen, and that it changes losses by rounding alone."""

import re

import numpy as np
import pytest

from rope_lm import execution
from tests.test_training import program, rows, train

ALONE = {"member": 1, "data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "platform, data, batch, accumulate, length, count",
    [
        ("cpu", 1, 16, 1, 256, 8),  # scale tiny on one device: two rows at once
        ("cpu", 2, 16, 1, 256, 4),  # and on two
        ("cpu", 2, 16, 1, 128, 2),  # scale nano
        ("cpu", 2, 16, 1, 512, 8),  # rows are not cut
        ("cpu", 1, 9, 1, 256, 3),  # the rows of a piece are equally many
        ("cpu", 1, 16, 2, 256, 8),  # a piece that was asked for is cut again
        ("cpu", 1, 4, 1, 8, 1),
        ("gpu", 1, 16, 1, 256, 1),
        ("gpu", 1, 16, 4, 256, 4),
    ],
)
def test_a_cpu_works_on_at_least_512_tokens_at_once(platform, data, batch, accumulate, length, count):
    chosen = execution.choose(platform, ALONE | {"data": data}, 2, "products", batch, accumulate, length, False)
    assert chosen.pieces == count


@pytest.mark.parametrize(
    "platform, member, layers, remat, asked, in_turn, written_out",
    [
        ("cpu", 1, 4, "products", False, True, True),
        ("cpu", 1, 5, "products", False, True, False),
        ("cpu", 1, 4, "full", False, True, False),
        ("cpu", 2, 4, "products", False, False, True),
        ("gpu", 1, 12, "products", False, False, True),
        ("gpu", 1, 13, "products", False, False, False),
        ("gpu", 1, 12, "full", False, False, False),
        ("gpu", 1, 4, "products", True, True, True),
        ("gpu", 2, 4, "products", True, False, True),
        ("tpu", 1, 4, "products", False, False, False),
    ],
)
def test_members_and_layers(platform, member, layers, remat, asked, in_turn, written_out):
    chosen = execution.choose(platform, ALONE | {"member": member}, layers, remat, 16, 1, 256, asked)
    assert (chosen.in_turn, chosen.written_out, chosen.in_place) == (in_turn, written_out, platform != "cpu")


@pytest.mark.parametrize(
    "change, tolerance",
    [
        ({"in_turn": False}, 1e-4),
        ({"pieces": 4}, 1e-4),
        ({"written_out": False}, 1e-5),
        ({"in_place": True}, 1e-5),
    ],
)
def test_what_is_chosen_changes_the_program_and_losses_by_rounding_alone(change, tolerance, monkeypatch):
    usual = program("rotary", 2)
    choose = execution.choose
    monkeypatch.setattr(execution, "choose", lambda *given: choose(*given)._replace(**change))
    other = program("rotary", 2)
    assert usual.execution != other.execution == usual.execution._replace(**change)
    batch = np.stack([rows(0, 0), rows(1, 0)])
    compiled = [each.step.lower(each.abstract, batch).compile() for each in (usual, other)]
    assert compiled[0].as_text() != compiled[1].as_text()
    kept = [each.memory_analysis().alias_size_in_bytes > 0 for each in compiled]
    assert kept == [usual.execution.in_place, other.execution.in_place]
    (_, losses), (_, same) = (train(each, [0, 1], [1e-2, 1e-2], 3) for each in (usual, other))
    np.testing.assert_allclose(same, losses, atol=tolerance)


@pytest.mark.parametrize("name", ["rotary", "xpos"])
def test_layers_written_out_are_computed_once_in_pieces_too(name):
    """XLA would not see that what hangs on waves was computed before, once they have left the loop over pieces."""

    def products(name: str) -> int:
        made = program(name, 1, accumulate=2)
        assert made.execution.written_out and made.execution.pieces == 2
        compiled = made.step.lower(made.abstract, rows(0, 0)[None]).compile()
        return len(re.findall(r"= f32\[[\d,]+\]\S* dot\(", compiled.as_text()))

    assert products(name) == products("none") > 20
