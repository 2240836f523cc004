"""Training: members, seeds, fairness of the start, divergence, the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import lm
from configs.presets import BLOCKS
from rope_lm import execution, objective, positional, sharding, training
from rope_lm.execution import Execution
from rope_lm.refusal import Refusal
from scripts import entry
from tests.models import LENGTH, VOCABULARY, position, section

OPTIMIZER = {
    "learning_rate": (1e-2,),
    "schedule": "constant",
    "warmup": 0.0,
    "cooldown": 0.2,
    "weight_decay": 0.1,
    "b1": 0.9,
    "b2": 0.95,
    "epsilon": 1e-8,
    "gradient_clip": 1.0,
    "accumulation_steps": 1,
}
CAUSAL = {"name": "causal"}
BATCH = 4


def program(
    name: str,
    members: int,
    steps: int = 100,
    model: dict | None = None,
    predicted: dict | None = None,
    **changes: object,
) -> training.Program:
    return training.make(
        {**section(name), **(model or {})},
        OPTIMIZER | changes,
        predicted or CAUSAL,
        vocabulary=VOCABULARY,
        steps=steps,
        members=members,
        batch=BATCH,
        length=LENGTH,
        mesh=sharding.make(1, 1, 1, 1),
    )


def rows(seed: int, step: int) -> np.ndarray:
    return np.random.default_rng([seed, step]).integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)


def train(made: training.Program, seeds: list[int], rates: list[float], steps: int) -> tuple:
    state, losses = made.init(np.array(seeds, np.uint32), np.array(rates, np.float32)), []
    for step in range(steps):
        state, metrics = made.step(state, np.stack([rows(seed, step) for seed in seeds]))
        losses.append(metrics.nats)
    return state, np.array(losses)


def test_compiling_the_start_quickly_changes_no_bit():
    made, given = program("learned", 2), (np.array([0, 1], np.uint32), np.ones(2, np.float32))
    fully = made.init.lower(*given).compile(compiler_options={"xla_backend_optimization_level": 3})
    jax.tree.map(np.testing.assert_array_equal, made.init(*given), fully(*given))


@pytest.mark.parametrize("name", sorted(positional.ENCODINGS))
def test_a_member_equals_its_seed_alone(name):
    together, losses = train(program(name, 3), [5, 6, 7], [1e-2, 1e-2, 3e-3], 5)
    alone, loss = train(program(name, 1), [6], [1e-2], 5)
    np.testing.assert_allclose(losses[:, 1], loss[:, 0], atol=1e-4)
    for a, b in zip(jax.tree.leaves(together.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a[1], b[0], atol=1e-4)
    assert np.abs(losses[:, 0] - losses[:, 1]).max() > 1e-3, "two seeds are two runs"


def test_shared_parameters_of_all_arms_start_bit_identical():
    seeds, rates = np.array([3, 4], np.uint32), np.ones(2, np.float32)
    reference = dict(jax.tree.leaves_with_path(program("none", 2).init(seeds, rates).params))
    for name in positional.ENCODINGS:
        params = program(name, 2).init(seeds, rates).params
        params.pop("position", None)
        found = dict(jax.tree.leaves_with_path(params))
        assert found.keys() == reference.keys()
        for path, leaf in found.items():
            np.testing.assert_array_equal(leaf, reference[path])
    leaf = reference[next(path for path in reference if "embedding" in str(path))]
    assert np.abs(leaf[0] - leaf[1]).max() > 0.1, "two seeds start apart"


def test_what_an_encoding_draws_is_its_own():
    """The same stream would give the learned positions the very values of the token embeddings."""
    params = program("learned", 1).init(np.array([0], np.uint32), np.ones(1, np.float32)).params
    table, embedding = params["position"]["table"][0], params["embedding"][0]
    assert abs(np.corrcoef(table[: len(embedding)].ravel(), embedding.ravel())[0, 1]) < 0.2


def test_a_tiny_model_overfits_one_row():
    made = program("rotary", 1)
    state = made.init(np.array([0], np.uint32), np.array([1e-2], np.float32))
    row = np.repeat(rows(0, 0)[:1], BATCH, 0)[None]
    for _ in range(80):
        state, metrics = made.step(state, row)
    assert float(metrics.nats[0]) < 0.1  # from ln 17 = 2.8


def test_evaluation_gives_totals_by_position_whatever_the_number_of_rows():
    made = program("learned", 2)
    state = made.init(np.array([0, 1], np.uint32), np.ones(2, np.float32))
    text = np.concatenate([rows(0, i) for i in range(3)])[:10]  # no multiple of the batch
    nats, tokens = made.evaluate(state, text)
    assert nats.shape == (2, LENGTH) and float(tokens.sum()) == 10 * LENGTH
    apart = sum(np.asarray(made.evaluate(state, text[i : i + 1])[0]) for i in range(10))
    np.testing.assert_allclose(nats, apart, rtol=1e-4)
    _, metrics = made.step(state, np.stack([rows(0, 0)] * 2))
    by_step = made.evaluate(made.init(np.array([0, 1], np.uint32), np.ones(2, np.float32)), rows(0, 0))[0]
    np.testing.assert_allclose(metrics.nats, by_step.sum(-1) / (BATCH * LENGTH), rtol=1e-4)


@pytest.mark.parametrize(
    "predicted", [CAUSAL, {"name": "masked", "mask_rate": 0.15, "mask_share": 0.8, "random_share": 0.1}]
)
def test_accumulated_gradients_are_those_of_the_whole_batch(predicted):
    """Each row with the draw that it has in the whole batch."""
    whole, losses = train(program("rotary", 2, predicted=predicted), [0, 1], [1e-2, 1e-2], 3)
    pieces, same = train(program("rotary", 2, predicted=predicted, accumulate=2), [0, 1], [1e-2, 1e-2], 3)
    np.testing.assert_allclose(same, losses, atol=1e-4)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(pieces.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("accumulation_steps", [1, 4])
@pytest.mark.parametrize("name", ["relative_bias", "fire", "shaw", "transformer_xl", "cope"])
def test_the_gradients_of_what_pieces_share_are_those_of_the_whole_batch(name, accumulate):
    made = program(name, 1, accumulate=accumulate)
    state = made.init(np.zeros(1, np.uint32), np.ones(1, np.float32))
    found = jax.tree.map(lambda each: each[0], made.gradients(state, rows(0, 0)[None])[1])
    graph, params, rest = nnx.split(made.model(state, 0), nnx.Param, ...)
    inputs, targets = jnp.asarray(rows(0, 0)[:, :-1]), jnp.asarray(rows(0, 0)[:, 1:])

    @jax.grad
    def plain(params: nnx.State) -> jax.Array:
        return objective.cross_entropy(nnx.merge(graph, params, rest)(inputs)[0], targets).mean()

    expected = nnx.to_pure_dict(plain(params))
    for each in (found, expected):
        each["position"].pop("end", None)  # FIRE's is added to all logits of a head: its gradient is rounding
    assert all(jnp.abs(each).max() > 1e-6 for each in jax.tree.leaves(expected["position"]))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * jnp.abs(b).max())


@pytest.mark.parametrize("name, by", [
    ("fire", "log1p"), ("kerple_log", "log1p"), ("continuous_bias", "log1p"), ("sandwich", "cos"),
    ("transformer_xl", "sin"),
])  # fmt: skip
def test_what_positions_alone_make_is_made_once_however_many_pieces(name, by):
    made = program(name, 1, accumulate=4)

    def pieces(jaxpr: jax.extend.core.Jaxpr) -> list[str]:
        found = []
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan" and equation.params["length"] == 4:
                found.append(str(equation))
            else:
                found += [each for inner in jax.core.jaxprs_in_params(equation.params) for each in pieces(inner)]
        return found

    whole = jax.make_jaxpr(made.step)(made.abstract, rows(0, 0)[None])
    (once,) = pieces(whole.jaxpr)
    assert f"= {by}" in str(whole) and f"= {by}" not in once


def test_a_member_that_diverges_is_frozen_and_the_others_go_on():
    made = program("rotary", 2)
    state = made.init(np.array([0, 1], np.uint32), np.array([1e-2, 1e-2], np.float32))
    batch = np.stack([rows(0, 0), rows(1, 0)])
    state, _ = made.step(state, batch)
    params = jax.tree.map(np.array, state.params)
    poisoned = state._replace(params=jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params))
    after, metrics = made.step(poisoned, batch)
    assert after.diverged.tolist() == [1, -1] and metrics.diverged.tolist() == [1, -1]
    assert bool(jnp.isfinite(metrics.nats[1]))
    leaves = zip(jax.tree.leaves(after.params), jax.tree.leaves(params), strict=True)
    assert max(np.abs(np.asarray(x)[1] - y[1]).max() for x, y in leaves) > 1e-4, "the other member learns"
    moments = jax.tree.map(np.array, after.moments)
    again, _ = made.step(after, batch)
    assert again.diverged.tolist() == [1, -1], "the step at which it happened is kept"
    for x, y in zip(jax.tree.leaves(again.moments), jax.tree.leaves(moments), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[0], y[0])


def test_only_matrices_decay_and_no_encoding_does():
    """With a gradient of zero what moves is what decays."""
    made = program("learned", 1, weight_decay=0.5, clip=1e-30)
    state = made.init(np.array([0], np.uint32), np.array([1e-2], np.float32))
    before = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state.params)}
    after, _ = made.step(state, rows(0, 0)[None])
    for path, x in jax.tree.leaves_with_path(after.params):
        name = jax.tree_util.keystr(path)
        decays = "weight" in name or "embedding" in name
        expected = before[name] * (1 - 1e-2 * 0.5) if decays else before[name]
        np.testing.assert_allclose(x, expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.1, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.1, 1.0, 0.5 * (1 + np.cos(np.pi * 40 / 90)), 0.5 * (1 + np.cos(np.pi * 80 / 90)), 0.0]),
        ("wsd", [0.1, 1.0, 1.0, (10 / 90) / 0.2, 0.0]),
    ],
)
def test_schedules(schedule, expected):
    made = training.optimizer.make(**OPTIMIZER | {"schedule": schedule, "warmup": 0.1}, steps=100, decays={"a": True})
    np.testing.assert_allclose([made.schedule(jnp.int32(s)) for s in (0, 9, 50, 90, 100)], expected, atol=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"schedule": "cosin"}, "unknown optimizer.schedule 'cosin': did you mean cosine"),
        ({"learning_rate": (0.0,)}, "optimizer.learning_rate=0.0: must be above 0"),
        ({"learning_rate": ()}, "optimizer.learning_rate=.*must be one or more values, each a finite number"),
        ({"warmup": 1.0}, "optimizer.warmup=1.0: must be at least 0 and below 1"),
        ({"weight_decay": float("nan")}, "optimizer.weight_decay=nan: must be a finite number"),
        ({"accumulation_steps": True}, "optimizer.accumulation_steps=True: must be a whole number"),
        ({"accumulation_steps": 3}, "data.batch = 4 cannot be cut into optimizer.accumulation_steps = 3"),
    ],
)
def test_a_mistake_in_the_optimizer_is_one_line(change, words):
    with pytest.raises(Refusal, match=words):
        program("none", 1, **change)


def test_rows_longer_than_an_encoding_are_refused():
    with pytest.raises(Refusal, match="Learned encodes indices below 8, the rows have 32 tokens"):
        program("learned", 1, model={"position": {"name": "learned", "limit": 8, "scale": 1.0}})


def memory(model: dict, members: int, batch: int, length: int, accumulate: int) -> tuple[int, int]:
    """Bytes of training: estimated, and by XLA's account of the step or, where it is more, the evaluation."""
    sizes = {"vocabulary": 257, "batch": batch, "length": length, "members": members}
    mesh = sharding.make(1, 1, 1, 1)
    made = training.make(model, OPTIMIZER | {"accumulation_steps": accumulate}, CAUSAL, **sizes, steps=9, mesh=mesh)
    rows = jax.ShapeDtypeStruct((members, batch, length + 1), jnp.int32)
    evaluated = jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)
    lowered = made.step.lower(made.abstract, rows), made.evaluate.lower(made.abstract, evaluated)
    step, evaluation = (each.compile().memory_analysis() for each in lowered)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(made.abstract.params)) // members
    estimated = training.memory(model, parameters, **sizes, causal=True, mesh=mesh.shape, execution=made.execution)
    used = lambda x: x.temp_size_in_bytes + x.argument_size_in_bytes + x.output_size_in_bytes - x.alias_size_in_bytes  # noqa: E731
    moments = 2 * 4 * parameters * members  # an evaluation does not take them, but they are there
    return estimated, max(used(step), used(evaluation) + moments)


@pytest.mark.parametrize(
    "members, remat, block",
    [(members, remat, "ours") for members in (1, 3) for remat in ("products", "full", "none")]
    + [(1, remat, block) for remat in ("products", "none") for block in ("llama", "bert")],
)
def test_memory_is_near_what_xla_says(members, remat, block):
    model = section("rotary", width=64, layers=4, hidden=256, remat=remat, block=BLOCKS[block])
    estimated, found = memory(model, members, batch=8, length=128, accumulate=1)
    assert estimated == pytest.approx(found, rel=0.35)


@pytest.mark.parametrize(
    "name, kernel, batch, length, accumulate",
    [
        ("rotary", "xla", 8, 128, 1),
        ("relative_bias", "blocked", 8, 128, 1),
        ("rotary", "blocked", 1, 2048, 1),
        ("rotary", "xla", 1, 2048, 1),
        ("relative_bias", "blocked", 1, 2048, 1),
        ("fire", "blocked", 8, 256, 1),
        ("cope", "blocked", 1, 1024, 1),
        ("shaw", "blocked", 8, 256, 1),
        ("rotary", "xla", 4, 1024, 4),  # where evaluation, of the whole batch at once, needs more than a step
    ],
)
def test_memory_knows_of_length_kernel_encoding_and_evaluation(name, kernel, batch, length, accumulate):
    attention = {"name": "softmax", "kernel": kernel}
    model = section(name, width=64, hidden=256, attention=attention, position=position(name, length))
    estimated, found = memory(model, 1, batch, length, accumulate)
    assert found / 1.5 < estimated < 1.5 * found


def test_memory_of_a_model_that_is_large_against_its_batch_is_that_of_its_state():
    estimated, found = memory(section("rotary", width=256, layers=8, hidden=1024), 1, batch=1, length=64, accumulate=1)
    assert estimated == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(
    "scale, changes, vocabulary, parameters",
    [("gpt2", {"tied": True}, 50_257, 124e6), ("gpt2", {}, 257, 85e6), ("1b", {}, 257, 1e9)],
)
def test_a_scale_has_the_parameters_that_it_is_named_for(scale, changes, vocabulary, parameters):
    config = entry.plain(lm.get_config(f"scale={scale}"))
    model = config["model"] | changes | {"attention": {"name": "softmax", "kernel": "xla"}}
    sizes = {"vocabulary": vocabulary, "batch": 1, "length": config["data"]["length"], "members": 1}
    made = training.make(model, config["optimizer"], CAUSAL, **sizes, steps=9, mesh=sharding.make(1, 1, 1, 1))
    assert sum(leaf.size for leaf in jax.tree.leaves(made.abstract.params)) == pytest.approx(parameters, rel=0.008)


PERFORMER = {"name": "performer", "features": 16, "redraw": 10, "block": 8}


@pytest.mark.parametrize("name, attention", [
    *((name, {"name": "softmax", "kernel": kernel})
      for name in ("rotary", "fire", "shaw", "transformer_xl", "cope") for kernel in ("xla", "blocked")),
    ("rotary", PERFORMER),
    ("rotary_features", PERFORMER),
])  # fmt: skip
def test_products_of_float32_numbers_are_in_float32_forward_and_backward(name, attention):
    """A GPU would take TF32 otherwise, and a TPU bfloat16."""
    made = program(name, 1, model={"attention": attention})
    step = made.step.lower(made.abstract, rows(0, 0)[None]).as_text()
    products = [line for line in step.splitlines() if "dot_general" in line]
    assert len(products) > 20 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize(
    "name, kernel, in_turn", [("alibi", "cudnn", True), ("rotary", "cudnn", False), ("alibi", "xla", False)]
)
def test_the_kernel_and_the_encoding_say_whether_members_take_turns(name, kernel, in_turn, monkeypatch):
    asked, choose = [], execution.choose
    monkeypatch.setattr(execution, "choose", lambda *given: asked.append(given[-1]) or choose(*given))
    program(name, 2, model={"attention": {"name": "softmax", "kernel": kernel}})
    assert asked == [in_turn]


@pytest.mark.parametrize("name, kernel, scale, members, written_out, found", [
    ("rotary", "cudnn", "gpt2", 1, True, 17.33),
    ("rotary", "cudnn", "gpt2", 1, False, 11.07),
    ("relative_bias", "cudnn", "gpt2", 1, True, 17.36),
    ("relative_bias", "xla", "gpt2", 1, True, 46.38),
    ("rotary", "xla", "tiny", 1, True, 0.36),
    ("rotary", "xla", "tiny", 8, True, 2.63),
])  # fmt: skip
def test_memory_is_near_what_xla_says_of_an_h200(name, kernel, scale, members, written_out, found):
    """results/benchmark_h200/by_hand.json: gigabytes."""
    config = lm.get_config(f"position={name},scale={scale}")
    config.model.attention.kernel, tied = kernel, scale == "gpt2"
    parameters, vocabulary = (123_551_232, 50_257) if tied else (820_000, 257)
    estimated = training.memory(
        entry.plain(config)["model"] | {"tied": tied},
        parameters,
        causal=True,
        vocabulary=vocabulary,
        length=config.data.length,
        batch=config.data.batch,
        members=members,
        mesh={"member": 1, "data": 1, "fsdp": 1, "tensor": 1},
        execution=Execution(in_turn=False, pieces=1, written_out=written_out, in_place=True),
    )
    assert 0.8 < estimated / 1e9 / found < 1.7


def test_gradients_that_accumulate_and_members_that_take_turns_are_held_a_second_time():
    def held(members: int, batch: int, pieces: int) -> int:
        sizes = {"causal": True, "vocabulary": 257, "length": 8, "members": members, "batch": batch}
        mesh = {"member": 1, "data": 1, "fsdp": 1, "tensor": 1}
        way = Execution(in_turn=True, pieces=pieces, written_out=False, in_place=True)
        return training.memory(section("none", layers=8), 10**6, **sizes, mesh=mesh, execution=way)

    assert held(1, 2, 2) - held(1, 1, 1) == 4 * 10**6
    assert held(2, 1, 1) - held(1, 1, 1) == 4 * 10**6 * (2 * 7 - 4)  # by turns the whole state is copied
