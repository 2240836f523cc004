"""TO BE DELETED at the merge: gives today's training.py the interface of its successor."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rope_lm import attention, positional, transformer
from rope_lm import training as old


class Program(NamedTuple):
    init: Any
    step: Any
    gradients: Any
    evaluate: Any
    model: Any
    objective: Any
    abstract: Any
    rows: Any
    execution: Any
    flops: float


class Metrics(NamedTuple):
    nats: Any
    gradient_norm: Any
    learning_rate: Any
    diverged: Any


class Evaluation(NamedTuple):
    nats: Any
    tokens: Any
    document_nats: Any
    document_tokens: Any


class Execution(NamedTuple):
    in_turn: bool
    pieces: int
    written_out: bool
    in_place: bool
    kernel: str
    compiler_options: Any


def make(config, *, vocabulary, members, mesh, deterministic=False):
    model = dict(config["model"])
    from rope_lm.settings import bind
    from rope_lm.transformer import Transformer

    bind(Transformer, model, "model", {"vocabulary": 0, "causal": True, "rngs": None})
    encoding = positional.encoding(model["position"])
    platform = mesh.devices.flat[0].platform
    head_size = model["width"] // max(1, model["heads"])
    model["attention"] = attention.resolve(
        model["attention"], platform, model["dtype"], encoding, head_size, mesh.shape["member"]
    )
    optimizer = {k: v for k, v in config["optimizer"].items() if k != "name"}
    p = old.make(
        model,
        optimizer,
        config["objective"],
        vocabulary=vocabulary,
        steps=config["steps"],
        members=members,
        batch=config["data"]["batch"],
        length=config["data"]["length"],
        mesh=mesh,
    )

    def step(state, rows):
        state, metrics = p.step(state, rows)
        return state, Metrics(*metrics)

    def evaluate(state, rows, documents):
        nats, tokens = p.evaluate(state, rows)
        here = jax.nn.one_hot(documents, documents.size)
        share = lambda x: jnp.einsum("rtg,t->g", here, x / rows.shape[0])  # noqa: E731
        return Evaluation(nats, tokens, jax.vmap(share)(nats), share(tokens))

    sizes = {key: model[key] for key in ("width", "heads", "layers", "hidden", "position", "attention", "block")}
    flops = transformer.flops_per_token(
        **sizes, causal=p.objective.causal, vocabulary=p.objective.vocabulary, length=config["data"]["length"]
    )
    shardings = jax.tree.map(lambda x: x.sharding, p.abstract)
    options = ({"xla_gpu_deterministic_ops": True} if platform == "gpu" else {}) if deterministic else None
    return Program(
        init=p.init,
        step=jax.jit(step, donate_argnums=(0,) if p.execution.in_place else (), in_shardings=(shardings, p.rows)),
        gradients=p.gradients,
        evaluate=jax.jit(evaluate, in_shardings=(shardings, None, None)),
        model=p.model,
        objective=p.objective,
        abstract=p.abstract,
        rows=p.rows,
        execution=Execution(*p.execution, attention.make(model["attention"]).kernel, options),
        flops=flops,
    )


def memory(compiled):
    analysis = compiled.memory_analysis()
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + fresh


def documents(text):
    return getattr(text, "validation_documents", np.zeros((len(text.validation), text.length), np.int32))


training = SimpleNamespace(make=make, Program=Program, State=old.State, Metrics=Metrics, Evaluation=Evaluation)
costs = SimpleNamespace(memory=memory, flops_per_token=lambda program: program.flops)
