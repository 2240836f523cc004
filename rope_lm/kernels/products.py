"""Matrix products with a fixed precision or a faster gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Full float32 products on accelerators, whose default rounds to fewer bits. A custom backward pass needs this even
# inside `transformer.full_precision`, because it is traced after the forward pass.
einsum = partial(jnp.einsum, precision="highest")


def repeated_plain(x: Float[Array, "*S"], rows: int) -> Float[Array, "B *S"]:
    """Repeat x for each of B rows."""
    return jnp.broadcast_to(x, (rows, *x.shape))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeated(x: Float[Array, "*S"], rows: int) -> Float[Array, "B *S"]:
    """Repeat x for each of B rows; its gradient is summed over rows by a matrix product.

    XLA's own sum over a leading axis is several times slower on a CPU.
    """
    return repeated_plain(x, rows)


def _repeated_forward(x: Float[Array, "*S"], rows: int) -> tuple[Float[Array, "B *S"], None]:
    return repeated_plain(x, rows), None


def _repeated_backward(rows: int, _: None, g: Float[Array, "B *S"]) -> tuple[Float[Array, "*S"]]:
    return (einsum("br,rs->bs", jnp.ones((1, rows), g.dtype), g.reshape(rows, -1)).reshape(g.shape[1:]),)


repeated.defvjp(_repeated_forward, _repeated_backward)
