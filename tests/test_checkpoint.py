"""Checkpoints: exact, verified, and whole or not there."""

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rope_lm.checkpoint import SUMS, Checkpoints, damage
from rope_lm.refusal import Refusal


def tree(number: float = 0.0) -> dict:
    return {"a": jnp.arange(1000, dtype=jnp.float32) + number, "b": {"c": jnp.full((3, 4), number, jnp.bfloat16)}}


def abstract(value: Any = None) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), value or tree())


def saved(folder: Path, steps: tuple[int, ...] = (1, 2, 3)) -> None:
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step))
        checkpoints.wait()


def equal(found: dict, number: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree(number)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_newest_comes_back_bit_for_bit_and_old_ones_go(tmp_path):
    saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        step, found, _ = checkpoints.restore(abstract())
    assert step == 3
    equal(found, 3)


def test_none_where_there_are_none(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract()) is None


def test_what_is_saved_is_the_state_at_the_save_whatever_comes_after(tmp_path):
    """The next step is given the same memory to overwrite (donation) while the save is still being written."""
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0 - 1, x), donate_argnums=0)
    large = {"a": jnp.arange(4_000_000, dtype=jnp.float32)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, large)
        jax.block_until_ready(step(large))
        checkpoints.wait()
        _, found, _ = checkpoints.restore(abstract({"a": jnp.zeros(4_000_000)}))
    np.testing.assert_array_equal(found["a"], np.arange(4_000_000, dtype=np.float32))


def spoil(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 8
        file.write_bytes(content)
    elif how == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()


def test_damage_to_any_file_is_found(tmp_path):
    saved(tmp_path / "whole", steps=(3,))
    whole = tmp_path / "whole" / "3"
    files = [path for path in whole.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 4 and damage(whole) is None
    for file in files:
        for how in ("flip", "truncate", "delete"):
            folder = Path(shutil.copytree(whole, tmp_path / "hurt", dirs_exist_ok=True))
            hurt = folder / file.relative_to(whole)
            spoil(hurt, how)
            assert hurt.name in damage(folder) or (hurt.name == SUMS and how == "flip"), (hurt, how)


def test_the_checkpoint_before_a_damaged_one_is_used_and_its_step_is_saved_again(tmp_path, capfd):
    saved(tmp_path)
    hurt = max((path for path in (tmp_path / "3").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    spoil(hurt, "flip")
    with Checkpoints(tmp_path, keep=2, saved=3) as checkpoints:
        step, found, _ = checkpoints.restore(abstract())
        assert step == 2 and (tmp_path / "bad" / "3.0").exists() and hurt.name in capfd.readouterr().err
        equal(found, 2)
        checkpoints.save(3, tree(33))
        checkpoints.wait()
        step, found, _ = checkpoints.restore(abstract())
        assert step == 3
        equal(found, 33)


def test_what_lacks_its_sums_is_kept_where_it_was_saved_and_goes_where_it_never_was(tmp_path):
    saved(tmp_path)
    for folder in ("2", "3"):
        (tmp_path / folder / SUMS).unlink()
    with (
        Checkpoints(tmp_path, keep=2, saved=2) as checkpoints,
        pytest.raises(Refusal, match=rf"\(step 2: {SUMS} is missing or torn\)"),
    ):
        checkpoints.restore(abstract())
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
    equal(ocp.StandardCheckpointer().restore((tmp_path / "bad" / "2.0" / "state").absolute(), abstract()), 2)


def test_a_save_is_told_of_once_it_is_whole(tmp_path):
    told = []
    with Checkpoints(tmp_path, 2, 0, lambda step: told.append((step, damage(tmp_path / str(step))))) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step))
        checkpoints.wait()
    assert told == [(1, None), (2, None)]


def test_an_old_one_that_cannot_be_removed_costs_no_new_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        (tmp_path / "c" / "1").symlink_to(tmp_path / "elsewhere")  # a link is not removed as a folder
        for step in (2, 3):
            checkpoints.save(step, tree(step))
        checkpoints.wait()
        step, found, _ = checkpoints.restore(abstract())
    assert step == 3
    equal(found, 3)


def test_nothing_whole_is_refused_with_the_list(tmp_path):
    saved(tmp_path)
    for folder in ("2", "3"):
        next((tmp_path / folder / "state").glob("manifest.ocdbt")).write_bytes(b"spoilt")
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(Refusal, match=r"no checkpoint .* is whole \(step 3: state/manifest.ocdbt .*step 2: "),
    ):
        checkpoints.restore(abstract())


def test_a_tree_of_another_shape_or_dtype_is_refused_naming_the_leaf(tmp_path):
    saved(tmp_path)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for other, words in [
            ({"a": jnp.zeros(999), "b": tree()["b"]}, r"holds a as float32\[1000\], this program has float32\[999\]"),
            ({"a": tree()["a"], "b": {"c": jnp.zeros((3, 4))}}, r"holds b/c as bfloat16\[3, 4\]"),
            ({"a": tree()["a"]}, r"holds b/c as bfloat16.*this program has nothing"),
        ]:
            with pytest.raises(Refusal, match=words):
                checkpoints.restore(abstract(other))


class Old(NamedTuple):
    """A state whose containers Orbax writes in its own way."""

    step: jax.Array
    moments: tuple


def test_a_tuple_with_empty_parts_comes_back_as_it_was(tmp_path):
    state = Old(jnp.int32(3), ((), {"mu": jnp.arange(3.0)}, ()))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, state, note=["n"])
        checkpoints.wait()
        step, found, note = checkpoints.restore(abstract(state))
    assert (step, note) == (3, ["n"]) and jax.tree.structure(found) == jax.tree.structure(state)
    np.testing.assert_array_equal(found.moments[1]["mu"], np.arange(3.0))


def test_importing_changes_no_registry_of_orbax():
    assert ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel, "Orbax's own default"


def test_the_call_returns_before_the_save_is_on_disk(tmp_path):
    state = {"a": jnp.zeros(1_250_000)}  # 5 MB, like a small model with its moments
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        began = time.monotonic()
        checkpoints.save(2, state)
        blocked = time.monotonic() - began
        checkpoints.wait()
    assert blocked < 0.25, f"{blocked:.3f} s"
