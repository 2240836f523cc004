"""State and the pure functions on it. The members of an ensemble are one program: `jax.vmap` appears here only.

Dimensions: M members, B rows of a batch, W = T + 1 tokens of a row, R rows of an evaluation.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt

from rope_lm import attention, execution, objective, optimizer, positional, sharding
from rope_lm.block import Style
from rope_lm.execution import Execution
from rope_lm.objective import Objective
from rope_lm.positions import contiguous
from rope_lm.refusal import Refusal
from rope_lm.settings import bind
from rope_lm.transformer import Prepared, Transformer


class State(NamedTuple):
    """All that training goes on from. Every array but `step` has a leading member axis M."""

    step: Int[Array, ""]  # updates done
    params: Any
    moments: Any  # the optimizer's
    rate: Float[Array, "M"]  # peak learning rate
    seed: UInt[Array, "M"]  # of all that is random in a member
    diverged: Int[Array, "M"]  # the step at which the member stopped being finite and was frozen; -1 if it never did


class Metrics(NamedTuple):
    """What one step says, per member."""

    nats: Float[Array, "M"]  # mean per token of the batch, before the update
    gradient_norm: Float[Array, "M"]  # before clipping
    rate: Float[Array, "M"]  # learning rate of this update
    diverged: Int[Array, "M"]  # as in State, after the update


class Program(NamedTuple):
    """Pure functions on plain pytrees, jitted over a mesh, and what is known of them before they run."""

    init: Callable[[UInt[Array, "M"], Float[Array, "M"]], State]  # seeds, peak rates
    step: Callable[[State, Int[Array, "M B W"]], tuple[State, Metrics]]
    gradients: Callable[[State, Int[Array, "M B W"]], tuple[Float[Array, "M"], Any]]  # of a step, with its nats
    evaluate: Callable[[State, Int[Array, "R W"]], tuple[Float[Array, "M T"], Float[Array, "T"]]]
    model: Callable[[State, int], Transformer]  # of a member, with what its attention draws at the state's step
    objective: Objective
    abstract: State  # shapes, dtypes and shardings
    rows: jax.sharding.Sharding  # of the rows of a step
    execution: Execution


def make(
    model: Mapping[str, Any],
    optimization: Mapping[str, Any],
    predicted: Mapping[str, Any],
    *,
    vocabulary: int,
    steps: int,
    members: int,
    batch: int,
    length: int,
    mesh: Mesh,
) -> Program:
    """The program that trains `members` copies of `model` at once to do what is `predicted` (a config's objective).

    `evaluate` returns totals per position (nats, tokens), never means: summed it is the loss, elementwise it is the
    loss by position; what the objective draws is the same for every member and at every step, by row. Raises Refusal
    for sections that do not fit `Transformer`, `optimizer.make` and `objective.make`.
    """
    example_of = objective.make(predicted, vocabulary=vocabulary)
    given = {"vocabulary": example_of.vocabulary, "causal": example_of.causal}
    placed = sharding.placing(mesh, ("batch",))

    def build(seed: UInt[Array, ""]) -> Transformer:
        # A stream of its own for the encoding: the shared parameters then start bit-identical in every arm.
        rngs = nnx.Rngs(params=_stream(seed, "params"), position=_stream(seed, "position"), features=0)
        return Transformer(**bind(Transformer, model, "model", {**given, "rngs": rngs}))

    shell = nnx.eval_shape(build, jnp.uint32(0))
    shell.position.check(length)
    graph, shapes, _ = nnx.split(shell, nnx.Param, ...)
    axes = _metadata(shapes, lambda path, variable: ("layer",) * ("blocks" in path) + variable.axes)
    decays = _metadata(shapes, lambda path, variable: variable.decays)
    adam = optimizer.make(**bind(optimizer.make, optimization, "optimizer", {"steps": steps, "decays": decays}))
    sharding.check(
        mesh.shape, members, _share(batch, adam.accumulation_steps), model["width"], model["heads"], model["hidden"]
    )
    in_turn = shell.attention.in_turn(type(shell.position))
    platform = mesh.devices.flat[0].platform
    way = execution.choose(
        platform, mesh.shape, shell.layers, shell.remat, batch, adam.accumulation_steps, length, in_turn
    )

    def draws(seed: UInt[Array, ""], step: Int[Array, ""]) -> dict[str, Any]:
        attention = shell.attention
        if not attention.redraw:
            return {}
        key = jax.random.fold_in(_stream(seed, "features"), step // attention.redraw)
        return {"drawn": attention.draw(key, shell.layers, shell.width // shell.heads)}

    def of(params: Any, drawn: Any) -> Transformer:
        made = nnx.merge(graph, nnx.State(params), nnx.State(drawn))
        made.written_out = way.written_out
        return made

    def prepare(params: Any, drawn: Any) -> Prepared:
        return of(params, drawn).prepare(contiguous(length), contiguous(length))

    def forward(
        model: Transformer, prepared: Prepared, rows: Int[Array, "B W"], keys: Key[Array, "B"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        example = example_of(rows, keys)
        model.placed = placed
        logits, _ = model(example.inputs, prepared=prepared)
        return objective.cross_entropy(logits, example.targets) * example.weights, example.weights

    def gradient(params: Any, seed: Any, step: Any, rows: Int[Array, "B W"]) -> tuple[Float[Array, ""], Any]:
        keys = jax.random.split(jax.random.fold_in(_stream(seed, "objective"), step), rows.shape[0])
        tokens = jnp.sum(example_of(rows, keys).weights)  # of all rows: the losses of some then add up

        def of_some(whole: Any, some: Any) -> tuple[Float[Array, ""], Any]:
            params, drawn, tokens = whole
            # Once for all pieces, and so is its gradient.
            prepared, back = jax.vjp(lambda params: prepare(params, drawn), params)

            def nats(params: Any, prepared: Prepared, piece: Any) -> Float[Array, ""]:
                return jnp.sum(forward(of(params, drawn), prepared, *piece)[0]) / tokens

            of_piece = lambda whole, piece: jax.value_and_grad(nats, argnums=(0, 1))(*whole, piece)  # noqa: E731
            loss, (direct, of_prepared) = sharding.in_pieces(of_piece, way.pieces)((params, prepared), some)
            return loss, jax.tree.map(jnp.add, direct, *back(of_prepared))

        return sharding.on_each(mesh, of_some)((params, draws(seed, step), tokens), (rows, keys))

    def init_member(seed: UInt[Array, ""], rate: Float[Array, ""]) -> tuple[Any, ...]:
        params = nnx.to_pure_dict(nnx.state(build(seed), nnx.Param))
        return params, adam.transform.init(params), rate, seed, jnp.int32(-1)

    def step_member(
        step: Any, params: Any, moments: Any, rate: Any, seed: Any, diverged: Any, rows: Any
    ) -> tuple[Any, Metrics]:
        nats, grads = gradient(params, seed, step, rows)
        norm = optax.global_norm(grads)
        now = rate * adam.schedule(step)
        direction, next_moments = adam.transform.update(grads, moments, params)
        next_params = jax.tree.map(lambda p, d: p - now * d, params, direction)
        # A member that is not finite stays as it last was; the others go on.
        good = (diverged < 0) & jnp.isfinite(nats) & jnp.isfinite(norm)
        keep = lambda new, old: jnp.where(good, new, old)  # noqa: E731
        params, moments = jax.tree.map(keep, (next_params, next_moments), (params, moments))
        diverged = jnp.where((diverged < 0) & ~good, step, diverged)
        return (params, moments, rate, seed, diverged), Metrics(nats, norm, now, diverged)

    over_members = _in_turn if way.in_turn else partial(jax.vmap, spmd_axis_name="member")

    def init(seeds: UInt[Array, "M"], rates: Float[Array, "M"]) -> State:
        return State(jnp.int32(0), *jax.vmap(init_member)(seeds, rates))

    def step(state: State, rows: Int[Array, "M B W"]) -> tuple[State, Metrics]:
        rest, metrics = over_members(partial(step_member, state.step))(*state[1:], rows)
        return State(state.step + 1, *rest), metrics

    def gradients(state: State, rows: Int[Array, "M B W"]) -> tuple[Float[Array, "M"], Any]:
        of_member = lambda params, seed, rows: gradient(params, seed, state.step, rows)  # noqa: E731
        return over_members(of_member)(state.params, state.seed, rows)

    def evaluate(state: State, rows: Int[Array, "R W"]) -> tuple[Float[Array, "M T"], Float[Array, "T"]]:
        padded = jnp.pad(rows, ((0, -rows.shape[0] % batch), (0, 0)))
        number = jnp.arange(len(padded))
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(number)

        def of_piece(whole: Any, piece: Any) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
            (*model, prepared), (rows, keys, real) = whole, piece
            return tuple((each * real[:, None]).sum(0) for each in forward(of(*model), prepared, rows, keys))

        def of_some(whole: Any, some: Any) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
            return sharding.in_pieces(of_piece, len(padded) // batch)((*whole, prepare(*whole)), some)

        def member(params: Any, seed: UInt[Array, ""]) -> Any:
            some = padded, keys, number < rows.shape[0]
            return sharding.on_each(mesh, of_some)((params, draws(seed, state.step)), some)

        nats, tokens = over_members(member)(state.params, state.seed)
        return nats, tokens[0]

    abstract = jax.eval_shape(init, jnp.zeros(members, jnp.uint32), jnp.zeros(members))
    shardings = _shardings(abstract, axes, adam.transform, mesh)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    rows = sharding.named(mesh, ("member", "batch"))
    whole = sharding.named(mesh, ())
    donated = (0,) if way.in_place else ()
    # It runs once: LLVM's later passes took most of the 3.1 s that a CPU compiled it (5.1 s for 8 members, now 1.1 and
    # 1.5), for the same bits.
    quickly = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
    return Program(
        init=jax.jit(init, out_shardings=shardings, compiler_options=quickly),
        step=jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, whole), donate_argnums=donated),
        gradients=jax.jit(gradients, in_shardings=(shardings, rows), out_shardings=(whole, shardings.params)),
        evaluate=jax.jit(evaluate, in_shardings=(shardings, whole), out_shardings=whole),
        model=lambda state, i: of(jax.tree.map(lambda x: x[i], state.params), draws(state.seed[i], state.step)),
        objective=example_of,
        abstract=abstract,
        rows=rows,
        execution=way,
    )


STREAMS = ("params", "position", "features", "objective")


def _stream(seed: UInt[Array, ""], name: str) -> Key[Array, ""]:
    """The key of one of the things that are random in a member: none hangs on how often another was drawn."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS.index(name))


def _shardings(abstract: State, axes: Any, transform: optax.GradientTransformation, mesh: Mesh) -> State:
    """Parameters by their own axes, the moments that have their shape likewise, all else by member."""
    is_names = lambda x: isinstance(x, tuple) and all(isinstance(each, str) for each in x)  # noqa: E731
    params = sharding.named(mesh, jax.tree.map(lambda each: ("member", *each), axes, is_leaf=is_names))
    member = sharding.named(mesh, ("member",))
    moments = optax.tree_utils.tree_map_params(
        transform, lambda _, each: each, abstract.moments, params, transform_non_params=lambda _: member
    )
    return State(sharding.named(mesh, ()), params, moments, member, member, member)


def _in_turn(function: Callable) -> Callable:
    """Like jax.vmap over every argument's leading axis, one element after another."""
    return lambda *arguments: jax.lax.map(lambda each: function(*each), arguments)


def memory(
    model: Mapping[str, Any],
    parameters: int,
    *,
    causal: bool,
    vocabulary: int,
    length: int,
    batch: int,
    members: int,
    mesh: Mapping[str, int],
    execution: Execution,
) -> int:
    """Bytes that training `members` needs on each device of a mesh of these sizes, by formula.

    Parameters, gradients (a second time where they accumulate) and two moments in float32, and the state that follows
    where it has memory of its own; for each token of a piece of the batch what the layers keep for the backward pass
    (the results of their products, or their inputs alone with remat="full"; more where they are written out), and what
    one layer works on or, where that is more, the logits with what is computed from them; and what the encoding works
    on, and holds for all rows, with its gradients. Or, where that is more, an evaluation: the state alone, and three
    quarters of what a layer works on, forward alone, but for the whole batch. Tests hold it against XLA's account, on a
    CPU and on a GPU.
    """
    width, heads, layers = model["width"], model["heads"], model["layers"]
    inner, size = Style(**model["block"]).inner(model["hidden"]), jnp.dtype(model["dtype"]).itemsize
    shape = positional.Shape(width, heads, width // heads, layers, causal)
    encoding = positional.abstract(model["position"], shape)
    # Bytes for each token of one layer: all that lies between its products, and the inside of its attention.
    between = size * (16 * width + 4 * inner)
    attending = attention.make(model["attention"])
    inside = 4 * attending.floats(heads, length, causal)
    pairs, at_once = length * attending.keys(length, causal), layers if execution.written_out else 1
    # Half of the inside is of the forward pass.
    keeps = {"none": between + inside / 2, "products": size * (7 * width + inner), "full": size * width}
    kept = keeps[model["remat"]]
    if execution.written_out:
        kept = (keeps["none"] + keeps["products"]) / 2  # by XLA's account

    def worked(rows: float) -> float:
        # The two of a layer do not live at once, nor do they with the logits.
        tokens = rows * length * max(between, inside, 3 * size * vocabulary)
        return tokens + 4 * 2 * pairs * encoding.floats(shape, rows, at_once)  # forward and backward

    rows = batch / (mesh["data"] * mesh["fsdp"])
    piece = rows / execution.pieces
    prepared = 4 * encoding.held(shape, length)
    step = worked(piece) + piece * length * layers * kept + prepared * (2 + (execution.pieces > 1))
    together = 1 if execution.in_turn else members
    in_place = execution.in_place and (members == 1 or not execution.in_turn)  # those that take turns are copied
    held = (4 if in_place else 7) * members + (execution.pieces > 1) * together
    each = 4 * parameters / (mesh["fsdp"] * mesh["tensor"])
    return int(max(each * held + together * step, each * 3 * members + together * (0.75 * worked(rows) + prepared)))


def _share(batch: int, accumulate: int) -> int:
    """Rows of one piece of the batch."""
    if batch % accumulate:
        raise Refusal(
            f"data.batch = {batch} cannot be cut into optimizer.accumulation_steps = {accumulate} equal pieces: change either"
        )
    return batch // accumulate


def _metadata(shapes: nnx.State, read: Callable[[tuple, nnx.Variable], Any]) -> Any:
    """The tree of parameters with what `read(path, parameter)` says of each in its place."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(shapes):
        *parents, leaf = path
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = read(path, variable)
    return tree
