"""The mesh, and the one table that says which of its axes splits which dimension."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rope_lm.refusal import Refusal

AXES = ("member", "data", "fsdp", "tensor")

# Logical dimension -> the mesh axes that split it. A dimension that is not named here is never split.
RULES: dict[str, str | tuple[str, ...]] = {
    "member": "member",
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "heads": "tensor",
    "hidden": "tensor",
}


def make(member: int, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over this process's devices. One axis may be -1: it takes the devices that the others leave.

    Raises Refusal when the sizes do not multiply to a number of devices that is there.
    """
    sizes, count = [member, data, fsdp, tensor], jax.device_count()
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise Refusal(f"mesh {shown}: every size must be at least 1, and at most one may be -1 (the devices left)")
    fixed = math.prod(size for size in sizes if size != -1)
    if fixed > count or (-1 in sizes and count % fixed):
        raise Refusal(f"mesh {shown}: asks for {fixed} devices or a multiple, there are {count}: change --config.mesh")
    sizes = [count // fixed if size == -1 else size for size in sizes]
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)


def spec(axes: tuple[str, ...]) -> P:
    """The partition of an array whose dimensions have these logical names."""
    return P(*(RULES.get(axis) for axis in axes))


def named(mesh: Mesh, axes: Any) -> Any:
    """A tree of shardings from a tree of tuples of logical names."""
    return jax.tree.map(lambda each: NamedSharding(mesh, spec(each)), axes, is_leaf=lambda x: isinstance(x, tuple))


def anywhere(x: jax.Array) -> jax.Array:
    """x, wherever it lies."""
    return x


def rows_alone(mesh: Mesh) -> bool:
    """Whether rows alone are split, besides members: every device then has all parameters of its members."""
    return mesh.shape["fsdp"] == mesh.shape["tensor"] == 1


def placing(mesh: Mesh, axes: tuple[str, ...]) -> Callable[[jax.Array], jax.Array]:
    """Says, inside what is `on_each`, that an array whose dimensions have these logical names lies split over the
    mesh."""
    if rows_alone(mesh):
        return anywhere
    return lambda x: jax.lax.with_sharding_constraint(x, named(mesh, axes))


def on_each(mesh: Mesh, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Like `function(whole, rows)`, which returns sums over its rows (arrays [B ...]): on a mesh that splits rows alone
    by every device for rows of its own. Devices then sum what they found once, in the end; XLA would in every piece,
    and wherever `whole` is broadcast over rows."""
    if not rows_alone(mesh):
        return function
    everywhere = lambda whole, rows: jax.lax.psum(function(whole, rows), "data")  # noqa: E731
    return jax.shard_map(everywhere, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)


def in_pieces(function: Callable[[Any, Any], Any], count: int) -> Callable[[Any, Any], Any]:
    """Like `function(whole, rows)`, which returns sums over its rows (arrays [B ...]), of less at once: in `count`
    pieces, one after another."""
    if count == 1:
        return function
    once = jax.jit(function, inline=True)  # traced once, though it is asked for its shapes and for its values

    def total(whole: Any, rows: Any) -> Any:
        # Every device has rows of every piece: one after another, the pieces would be those of single devices.
        pieces = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), rows)
        found = jax.eval_shape(once, whole, jax.tree.map(lambda x: x[0], pieces))
        add = lambda total, piece: (jax.tree.map(jnp.add, total, once(whole, piece)), None)  # noqa: E731
        return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found), pieces)[0]

    return total


def check(sizes: Mapping[str, int], members: int, batch: int, width: int, heads: int, hidden: int) -> None:
    """Raises Refusal, naming both numbers, for a dimension that a mesh of these sizes cannot divide."""
    split = [
        ("members (seeds x rates)", members, "member", sizes["member"]),
        ("data.batch / optimizer.accumulation_steps", batch, "data x fsdp", sizes["data"] * sizes["fsdp"]),
        ("model.width", width, "fsdp", sizes["fsdp"]),
        ("model.heads", heads, "tensor", sizes["tensor"]),
        ("model.hidden", hidden, "tensor", sizes["tensor"]),
    ]
    for what, size, axis, parts in split:
        if size % parts:
            raise Refusal(f"{what} = {size} cannot be shared by {parts} devices (mesh {axis}): change one of the two")
