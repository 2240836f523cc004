"""The mesh, and the one table of which mesh axes split which dimension."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rope_lm import environment
from rope_lm.refusal import Refusal

AXES = ("member", "data", "fsdp", "tensor")

# Logical dimension -> the mesh axes that split it. A dimension without a row is never split.
RULES: dict[str, str | tuple[str, ...]] = {
    "member": "member",
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "heads": "tensor",
    "hidden": "tensor",
}


def make(member: int, data: int, fsdp: int, tensor: int) -> Mesh:
    """Return a mesh over this process's devices. One axis may be -1: it takes the devices that the others leave.

    Raises Refusal if the product of the sizes does not match the available devices.
    """
    sizes, devices = [member, data, fsdp, tensor], environment.devices()
    count = len(devices)
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise Refusal(f"mesh {shown}: every size must be at least 1, and at most one may be -1 (the devices left)")
    fixed = math.prod(size for size in sizes if size != -1)
    if fixed > count or (-1 in sizes and count % fixed):
        raise Refusal(f"mesh {shown}: asks for {fixed} devices or a multiple, there are {count}: change --config.mesh")
    sizes = [count // fixed if size == -1 else size for size in sizes]
    return Mesh(
        np.array(devices[: math.prod(sizes)]).reshape(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4
    )


def spec(axes: tuple[str, ...]) -> P:
    """Return the partition of an array whose dimensions have these logical names."""
    return P(*(RULES.get(axis) for axis in axes))


def named(mesh: Mesh, axes: Any) -> Any:
    """Return a tree of shardings for a tree of tuples of logical names."""
    return jax.tree.map(lambda names: NamedSharding(mesh, spec(names)), axes, is_leaf=lambda x: isinstance(x, tuple))


def splits_rows_only(mesh: Mesh) -> bool:
    """Return True if, besides members, only rows are split, so that every device has its members' parameters."""
    return mesh.shape["fsdp"] == mesh.shape["tensor"] == 1


def stream(mesh: Mesh) -> NamedSharding | None:
    """Return the sharding of the residual stream [B*T D]; None if every device computes its own rows (`on_each`)."""
    return None if splits_rows_only(mesh) else NamedSharding(mesh, spec(("batch",)))


def on_each(mesh: Mesh, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Compute `function(whole, rows)`, which returns sums over its rows, on each device for that device's rows.

    `rows` are arrays [B ...]. Results are summed over devices once, at the end; left to itself, XLA would sum in every
    piece, and wherever `whole` is broadcast over rows. If the mesh splits more than rows, return `function` unchanged.
    """
    if not splits_rows_only(mesh):
        return function

    def summed(whole: Any, rows: Any) -> Any:
        return jax.lax.psum(function(whole, rows), "data")

    return jax.shard_map(summed, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)


def in_pieces(function: Callable[[Any, Any], Any], count: int) -> Callable[[Any, Any], Any]:
    """Compute `function(whole, rows)`, which returns sums over its rows, on `count` pieces of the rows in turn."""
    if count == 1:
        return function
    once = jax.jit(function, inline=True)  # traced once, for its shapes and for its values

    def total(whole: Any, rows: Any) -> Any:
        # Every device has rows of every piece. Consecutive rows would give each piece to single devices.
        pieces = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), rows)
        shapes = jax.eval_shape(once, whole, jax.tree.map(lambda x: x[0], pieces))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(sums: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, once(whole, piece)), None

        return jax.lax.scan(add, zeros, pieces)[0]

    return total


def check(sizes: Mapping[str, int], members: int, batch: int, model: Mapping[str, Any]) -> None:
    """Raise Refusal, naming both numbers, for a dimension that a mesh of these sizes cannot divide.

    `batch`: rows of one piece of a step; `model`: the config's section.
    """
    split = [
        ("members (seeds x rates)", members, "member", sizes["member"]),
        ("data.batch / optimizer.accumulation_steps", batch, "data x fsdp", sizes["data"] * sizes["fsdp"]),
        ("model.width", model["width"], "fsdp", sizes["fsdp"]),
        ("model.heads", model["heads"], "tensor", sizes["tensor"]),
        ("model.hidden", model["hidden"], "tensor", sizes["tensor"]),
    ]
    for dimension, size, axis, parts in split:
        if size % parts:
            raise Refusal(
                f"{dimension} = {size} cannot be shared by {parts} devices (mesh {axis}): change one of the two"
            )
