"""Costs of a program: floating-point operations from its jaxpr, memory from the compiled program."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from rope_lm import training
from rope_lm.training import Program, Rows


def flops_per_token(program: Program) -> float:
    """Return the floating-point operations of training on one token, the backward pass as twice the forward pass.

    Only matrix products are counted. Softmax attention is counted as the blocked kernel computes it (in causal
    attention, about the half that is not masked) whichever kernel runs, so that platforms can be compared. Work shared
    by all rows of a batch is divided by its tokens. Recomputation for the backward pass is not counted.
    """
    spec = program.spec
    if "kernel" in spec.model["attention"]:
        model = {**spec.model, "attention": {**spec.model["attention"], "kernel": "blocked"}}
        build = partial(training.build, model, spec.objective, spec.abstract.layout)
        spec = replace(spec, model=model, abstract=nnx.eval_shape(build, jnp.uint32(0)))

    def forward(params: Any, untrained: Any, tokens: jax.Array, keys: jax.Array) -> Any:
        bias = training.shared_bias(spec, untrained, params)
        return training.token_losses(spec, params, untrained, bias, Rows(tokens, keys))[0]

    params = nnx.to_pure_dict(nnx.state(spec.abstract, nnx.Param))
    untrained = jax.eval_shape(partial(training.untrained, spec), jnp.uint32(0), jnp.int32(0))
    tokens = jax.ShapeDtypeStruct((spec.batch, spec.length + 1), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), spec.batch))
    jaxpr = jax.make_jaxpr(forward)(params, untrained, tokens, keys)
    return 3 * products(jaxpr.jaxpr) / (spec.batch * spec.length)


def products(jaxpr: core.Jaxpr) -> float:
    """Return the floating-point operations of a jaxpr's matrix products, two per multiplication.

    Loops count each of their iterations, conditionals their costliest branch. A loop of unknown length counts once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _dot_general(equation)
        counts = [products(inner) for inner in _inner(equation)]
        if equation.primitive.name == "cond":
            total += max(counts)
        else:
            total += sum(counts) * equation.params.get("length", 1)
    return total


def _dot_general(equation: core.JaxprEqn) -> float:
    left: Any = equation.invars[0].aval
    out: Any = equation.outvars[0].aval
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)


def _inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yield the jaxprs that an equation runs. For a custom derivative, only the forward function."""
    for name, value in equation.params.items():
        if name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
            continue
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def memory(compiled: jax.stages.Compiled) -> int:
    """Return the bytes that a compiled program needs on each device: arguments, temporaries and new results."""
    found = compiled.memory_analysis()
    assert found is not None  # every backend that trains reports it
    return (
        found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    )
