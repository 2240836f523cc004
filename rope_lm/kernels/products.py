"""Matrix products with a fixed precision or a faster gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Full float32 products on accelerators, whose default rounds to fewer bits. A custom backward pass needs this even
# inside `transformer.full_precision`, because it is traced after the forward pass.
einsum = partial(jnp.einsum, precision="highest")


def linear_plain(x: Float[Array, "R D"], w: Float[Array, "D F"]) -> Float[Array, "R F"]:
    """Return x w."""
    return einsum("rd,df->rf", x, w)


@jax.custom_vjp
def linear(x: Float[Array, "R D"], w: Float[Array, "D F"]) -> Float[Array, "R F"]:
    """Return x w. If w has more rows than columns, its gradient is computed as the transpose of g^T x.

    XLA copies the first array of a product on a CPU, and this order makes that the narrower one.
    """
    return linear_plain(x, w)


def _linear_forward(
    x: Float[Array, "R D"], w: Float[Array, "D F"]
) -> tuple[Float[Array, "R F"], tuple[Float[Array, "R D"], Float[Array, "D F"]]]:
    return linear_plain(x, w), (x, w)


def _linear_backward(
    kept: tuple[Float[Array, "R D"], Float[Array, "D F"]], g: Float[Array, "R F"]
) -> tuple[Float[Array, "R D"], Float[Array, "D F"]]:
    x, w = kept
    if w.shape[0] > w.shape[1]:
        dw = jax.lax.optimization_barrier(einsum("rf,rd->fd", g, x)).T  # XLA would otherwise undo the transposition
    else:
        dw = einsum("rd,rf->df", x, g)
    return einsum("rf,df->rd", g, w), dw


linear.defvjp(_linear_forward, _linear_backward)


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
