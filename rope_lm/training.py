"""The training state, and pure functions on it. One program trains all members of an ensemble (`over_members`).

Dimensions: M members, B rows of a batch, W = T + 1 tokens of a row, R rows of an evaluation, G documents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.stages import Wrapped
from jaxtyping import Array, Float, Int, Key, UInt

from rope_lm import environment, execution, objective, optimizer, positional, sharding, transformer
from rope_lm.execution import Execution
from rope_lm.kernels.softmax import Added
from rope_lm.objective import Objective
from rope_lm.optimizer import Optimizer
from rope_lm.positional import Constant
from rope_lm.positions import View, contiguous
from rope_lm.refusal import Refusal
from rope_lm.settings import bind
from rope_lm.transformer import Layout, Transformer


class State(NamedTuple):
    """Everything that training continues from. Every array but `step` has a leading member axis M."""

    step: Int[Array, ""]  # updates done
    params: Any
    moments: Any  # the optimizer's state
    rate: Float[Array, "M"]  # peak learning rate
    seed: UInt[Array, "M"]
    diverged: Int[Array, "M"]  # step at which the member stopped being finite and was frozen; -1 if it never did


class Metrics(NamedTuple):
    """Metrics of one step, per member."""

    nats: Float[Array, "M"]  # mean per token of the batch, before the update
    gradient_norm: Float[Array, "M"]  # before clipping
    learning_rate: Float[Array, "M"]  # of this update
    diverged: Int[Array, "M"]  # as in State, after the update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """The document that each target of an evaluation belongs to."""

    number: Any  # int32 [R, T]: of each target's document, from 0 to G - 1; a tracer or a placeholder too
    count: int = field(metadata={"static": True})  # G


class Evaluation(NamedTuple):
    """Sums over an evaluation, by position and by document. The loss is nats / tokens, summed or elementwise."""

    nats: Float[Array, "M T"]
    tokens: Float[Array, "T"]
    document_nats: Float[Array, "M G"]
    document_tokens: Float[Array, "G"]


@dataclass(frozen=True)
class Spec:
    """Everything that the functions below depend on besides their arrays."""

    model: Mapping[str, Any]  # the config's section, with the kernel that "auto" stands for
    abstract: Transformer  # shapes and dtypes in place of values
    objective: Objective
    optimizer: Optimizer
    execution: Execution
    mesh: Mesh
    members: int
    batch: int  # rows of a step
    length: int  # tokens of a row


class Rows(NamedTuple):
    """Rows of tokens, each with its random key."""

    tokens: Int[Array, "B W"]
    keys: Key[Array, "B"]


class Program(NamedTuple):
    """The functions below jitted over a mesh, and their arguments' shapes."""

    spec: Spec
    init: Wrapped  # seeds, peak learning rates -> State
    step: Wrapped  # State, rows [M B W] -> State, Metrics
    gradients: Wrapped  # State, rows [M B W] -> nats [M], gradients
    evaluate: Wrapped  # State, rows [R W], Documents -> Evaluation
    abstract: State  # shapes, dtypes and shardings
    rows: Sharding  # of the rows of a step

    @property
    def objective(self) -> Objective:
        """The training objective."""
        return self.spec.objective

    @property
    def execution(self) -> Execution:
        """The decisions made for this platform."""
        return self.spec.execution

    def model(self, state: State, member: int) -> Transformer:
        """Return the model of one member, with the random numbers of its attention at the state's step."""
        params = jax.tree.map(lambda x: x[member], state.params)
        return merge(self.spec, params, untrained(self.spec, state.seed[member], state.step))


STREAMS = ("params", "position", "features", "objective")


def stream(seed: UInt[Array, ""], name: str) -> Key[Array, ""]:
    """Return the random key of one of STREAMS. Drawing from one does not affect the others."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS.index(name))


def build(model: Mapping[str, Any], objective: Objective, layout: Layout, seed: UInt[Array, ""]) -> Transformer:
    """Build a model from a config's section, with the initial values of a seed."""
    # The encoding has a stream of its own, so shared parameters start bit-identical in every arm.
    rngs = nnx.Rngs(params=stream(seed, "params"), position=stream(seed, "position"), features=0)
    given = {"vocabulary": objective.vocabulary, "causal": objective.causal, "layout": layout, "rngs": rngs}
    return Transformer(**bind(Transformer, model, "model", given))


def specify(
    config: Mapping[str, Any], *, vocabulary: int, members: int, mesh: Mesh, deterministic: bool = False
) -> Spec:
    """Return the specification of a run's program, compiling nothing.

    `config`: the whole config of the run; `vocabulary`: of its text. Raises Refusal for sections that do not fit
    `Transformer`, `optimizer.make` and `objective.make`, and for a mesh that cannot divide the work.
    """
    environment.pin()
    predicted = objective.make(config["objective"], vocabulary=vocabulary)
    batch, length = config["data"]["batch"], config["data"]["length"]
    model = dict(config["model"])
    bind(Transformer, model, "model", {"vocabulary": 0, "causal": True, "layout": None, "rngs": None})
    width, heads, head_size, layers = (model[key] for key in ("width", "heads", "head_size", "layers"))
    shape = transformer.check(width, heads, head_size, layers, predicted.causal)
    effects = positional.effects(model["position"], shape)

    def decays(params: Any) -> Any:  # called once the model is known
        return metadata(abstract, lambda path, variable: variable.decays)

    made = optimizer.make(config["optimizer"], steps=config["steps"], decays=decays)
    if batch % made.accumulation_steps:
        raise Refusal(
            f"data.batch = {batch} cannot be cut into optimizer.accumulation_steps = {made.accumulation_steps} equal "
            "pieces: change either"
        )
    sharding.check(mesh.shape, members, batch // made.accumulation_steps, model)
    platform = mesh.devices.flat[0].platform
    chosen = execution.choose(config, effects, platform=platform, mesh=mesh.shape, deterministic=deterministic)
    if "kernel" in model["attention"]:
        model["attention"] = {**model["attention"], "kernel": chosen.kernel}
    layout = Layout(chosen.unroll, sharding.stream(mesh))
    abstract = nnx.eval_shape(partial(build, model, predicted, layout), jnp.uint32(0))
    positional.check_length(abstract.position, length)
    return Spec(model, abstract, predicted, made, chosen, mesh, members, batch, length)


def merge(spec: Spec, params: Any, untrained: Any) -> Transformer:
    """Return the model with these variables."""
    return nnx.merge(nnx.graphdef(spec.abstract), nnx.State(params), nnx.State(untrained))


def untrained(spec: Spec, seed: UInt[Array, ""], step: Int[Array, ""]) -> dict[str, Any]:
    """Return a model's variables that are not trained: constants, and attention's random numbers at a step."""
    model, found = spec.abstract, dict[str, Any]()
    if nnx.state(model.position, Constant):
        shape = positional.Shape(model.width, model.heads, model.head_size, model.layers, model.causal)
        position = positional.make(spec.model["position"], shape=shape, rngs=nnx.Rngs(0))
        found["position"] = nnx.to_pure_dict(nnx.state(position, Constant))
    if model.attention.redraw:
        key = jax.random.fold_in(stream(seed, "features"), step // model.attention.redraw)
        found["drawn"] = model.attention.draw(key, model.layers, model.rotated_size)
    return found


def token_losses(
    spec: Spec, params: Any, untrained: Any, bias: Added | None, rows: Rows
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return the weighted nats of every target, and the weights. `bias`: the result of `shared_bias`."""
    example = spec.objective(*rows)
    logits, _ = merge(spec, params, untrained)(example.inputs, bias=bias)
    return objective.cross_entropy(logits, example.targets) * example.weights, example.weights


def shared_bias(spec: Spec, untrained: Any, params: Any) -> Added | None:
    """Return the model's bias for contiguous rows: one for all rows, so it is computed once per step."""
    positions = contiguous(spec.length)
    return merge(spec, params, untrained).bias(View(positions, positions, spec.objective.causal))


class Given(NamedTuple):
    """Inputs of the loss that are not differentiated."""

    untrained: Any
    tokens: Float[Array, ""]  # of the whole batch, so that losses of pieces add up to the mean


def loss(spec: Spec, params: Any, bias: Added | None, given: Given, rows: Rows) -> Float[Array, ""]:
    """Return the contribution of some rows to the mean nats per token of a batch."""
    return jnp.sum(token_losses(spec, params, given.untrained, bias, rows)[0]) / given.tokens


def gradients(
    spec: Spec, params: Any, seed: UInt[Array, ""], step: Int[Array, ""], tokens: Int[Array, "B W"]
) -> tuple[Float[Array, ""], Any]:
    """Return one member's mean nats per token of a batch, and their gradient."""
    keys = jax.random.split(jax.random.fold_in(stream(seed, "objective"), step), tokens.shape[0])
    count = jnp.sum(spec.objective(tokens, keys).weights)

    def on_piece(whole: Any, rows: Rows) -> Any:
        return jax.value_and_grad(partial(loss, spec), argnums=(0, 1))(*whole, rows)

    def on_device(whole: Any, rows: Rows) -> Any:
        params, given = whole
        # The bias is shared by all pieces, and so is its gradient.
        bias, pull_back = jax.vjp(partial(shared_bias, spec, given.untrained), params)
        nats, (direct, of_bias) = sharding.in_pieces(on_piece, spec.execution.pieces)((params, bias, given), rows)
        return nats, jax.tree.map(jnp.add, direct, *pull_back(of_bias))

    whole = params, Given(untrained(spec, seed, step), count)
    return sharding.on_each(spec.mesh, on_device)(whole, Rows(tokens, keys))


def update(spec: Spec, member: State, nats: Float[Array, ""], grads: Any) -> tuple[State, Metrics]:
    """Apply one member's gradient. A member is frozen for good once its loss or gradient is not finite."""
    norm = optax.global_norm(grads)
    learning_rate = member.rate * spec.optimizer.schedule(member.step)
    direction, moments = spec.optimizer.transform.update(grads, member.moments, member.params)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, member.params, direction)
    finite = jnp.isfinite(nats) & jnp.isfinite(norm)
    good = (member.diverged < 0) & finite
    kept = (member.params, member.moments)
    params, moments = jax.tree.map(partial(jnp.where, good), (params, moments), kept)
    diverged = jnp.where((member.diverged < 0) & ~finite, member.step, member.diverged)
    updated = member._replace(params=params, moments=moments, diverged=diverged)
    return updated, Metrics(nats, norm, learning_rate, diverged)


def over_members(spec: Spec, function: Callable[..., Any], *arguments: Any) -> Any:
    """Apply a function to every member: arguments and results have a leading axis M."""
    if spec.execution.members_in_turn:
        return jax.lax.map(lambda member: function(*member), arguments)
    return jax.vmap(function, spmd_axis_name="member")(*arguments)


def initialize(spec: Spec, seeds: UInt[Array, "M"], rates: Float[Array, "M"]) -> State:
    """Return the state at step 0 of members with these seeds and peak learning rates."""

    def member(seed: UInt[Array, ""]) -> tuple[Any, Any]:
        model = build(spec.model, spec.objective, spec.abstract.layout, seed)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return params, spec.optimizer.transform.init(params)

    params, moments = jax.vmap(member)(seeds)
    return State(jnp.int32(0), params, moments, rates, seeds, jnp.full(spec.members, -1, jnp.int32))


def batch_gradients(spec: Spec, state: State, rows: Int[Array, "M B W"]) -> tuple[Float[Array, "M"], Any]:
    """Return the nats and gradients of every member."""

    def member(params: Any, seed: UInt[Array, ""], tokens: Int[Array, "B W"]) -> tuple[Float[Array, ""], Any]:
        return gradients(spec, params, seed, state.step, tokens)

    return over_members(spec, member, state.params, state.seed, rows)


def train_step(spec: Spec, state: State, rows: Int[Array, "M B W"]) -> tuple[State, Metrics]:
    """Update every member once."""

    def member(rest: tuple, tokens: Int[Array, "B W"]) -> tuple[tuple, Metrics]:
        before = State(state.step, *rest)
        updated, metrics = update(spec, before, *gradients(spec, before.params, before.seed, state.step, tokens))
        return updated[1:], metrics

    rest, metrics = over_members(spec, member, tuple(state[1:]), rows)
    return State(state.step + 1, *rest), metrics


def evaluate(spec: Spec, state: State, rows: Int[Array, "R W"], documents: Documents) -> Evaluation:
    """Return every member's totals over some rows.

    Random choices of the objective depend only on a row's index, so they are the same for every member and step.
    """
    padding = ((0, -len(rows) % spec.batch), (0, 0))
    tokens, number = jnp.pad(rows, padding), jnp.pad(documents.number, padding)
    row = jnp.arange(len(tokens))
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(row)
    some = Rows(tokens, keys), number, row < len(rows)

    def on_piece(whole: Any, some: Any) -> Evaluation:
        rows, number, real = some
        params, untrained, bias = whole
        nats, weights = (x * real[:, None] for x in token_losses(spec, params, untrained, bias, rows))
        by_document = partial(jax.ops.segment_sum, segment_ids=number.ravel(), num_segments=documents.count)
        return Evaluation(nats.sum(0), weights.sum(0), by_document(nats.ravel()), by_document(weights.ravel()))

    def on_device(whole: Any, some: Any) -> Evaluation:
        params, untrained = whole
        bias = shared_bias(spec, untrained, params)
        return sharding.in_pieces(on_piece, len(tokens) // spec.batch)((params, untrained, bias), some)

    def member(params: Any, seed: UInt[Array, ""]) -> Evaluation:
        whole = params, untrained(spec, seed, state.step)
        return sharding.on_each(spec.mesh, on_device)(whole, some)

    totals = over_members(spec, member, state.params, state.seed)
    return totals._replace(tokens=totals.tokens[0], document_tokens=totals.document_tokens[0])


def make(
    config: Mapping[str, Any], *, vocabulary: int, members: int, mesh: Mesh, deterministic: bool = False
) -> Program:
    """Jit the program that trains the members of a run. Raises Refusal as `specify` does."""
    spec = specify(config, vocabulary=vocabulary, members=members, mesh=mesh, deterministic=deterministic)
    abstract = jax.eval_shape(
        partial(initialize, spec), jax.ShapeDtypeStruct((members,), jnp.uint32), jax.ShapeDtypeStruct((members,), float)
    )
    shardings = _shardings(spec, abstract)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    rows, everywhere = sharding.named(mesh, ("member", "batch")), sharding.named(mesh, ())
    options = dict[str, bool | int](spec.execution.compiler_options)
    jit = partial(jax.jit, compiler_options=options)
    return Program(
        spec=spec,
        init=jax.jit(
            partial(initialize, spec),
            out_shardings=shardings,
            compiler_options={**options, **spec.execution.init_options},
        ),
        step=jit(
            partial(train_step, spec),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        gradients=jit(
            partial(batch_gradients, spec),
            in_shardings=(shardings, rows),
            out_shardings=(everywhere, shardings.params),
        ),
        evaluate=jit(
            partial(evaluate, spec), in_shardings=(shardings, everywhere, everywhere), out_shardings=everywhere
        ),
        abstract=state,
        rows=rows,
    )


def _shardings(spec: Spec, abstract: State) -> State:
    """Return a state's shardings: parameters and their moments by the parameters' axes, the rest by member."""

    def axes(path: tuple, variable: nnx.Variable) -> tuple[str, ...]:
        return ("member", *("layer",) * ("blocks" in path), *variable.axes)

    params = metadata(spec.abstract, lambda path, variable: sharding.named(spec.mesh, axes(path, variable)))
    member = sharding.named(spec.mesh, ("member",))
    moments = optax.tree_utils.tree_map_params(
        spec.optimizer.transform,
        lambda _, own: own,
        abstract.moments,
        params,
        transform_non_params=lambda _: member,
    )
    return State(sharding.named(spec.mesh, ()), params, moments, member, member, member)


def metadata(model: Transformer, read: Callable[[tuple, nnx.Variable], Any]) -> dict[str, Any]:
    """Return the tree of a model's parameters with each replaced by `read(path, parameter)`."""
    return nnx.to_pure_dict(nnx.map_state(read, nnx.state(model, nnx.Param)))
