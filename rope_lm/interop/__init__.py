"""Models in the layouts of Hugging Face transformers (Llama, GPT-NeoX, GPT-2, RoFormer), without using that library.

A loaded model gives the same logits here as in transformers, and so does a saved one there; tests/goldens checks both.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rope_lm import execution, positional, settings
from rope_lm.data.tokenizer import Tokenizer
from rope_lm.interop import files, vocabulary
from rope_lm.interop.layouts import LAYOUTS, Layout
from rope_lm.interop.tensors import Tensor
from rope_lm.refusal import Refusal, unknown
from rope_lm.transformer import PLAIN, Transformer, check

__all__ = ["LAYOUTS", "Model", "load", "make", "params", "save", "shell"]


class Model(NamedTuple):
    """A model as plain data."""

    section: Mapping[str, Any]  # `model` of a config
    params: Mapping[str, Any]  # the tree of parameters of one member, float32
    vocabulary: int
    causal: bool  # True if no token sees a token after it
    length: int  # the longest text that it is meant for, in tokens


def load(folder: Path | str) -> Model:
    """Return the model in a folder with config.json and model.safetensors, or several weight files and their index.

    Keys of the section that the files do not determine (`dtype`, `remat`, the kernel) are as in configs/lm.py. Raises
    Refusal for an architecture or an option without a counterpart here, and for tensors that are missing or unexpected,
    or whose shape contradicts config.json.
    """
    folder = settings.path(str(folder), f"load({str(folder)!r})")
    config = files.read_config(folder)
    layout = _layout(config)
    config = layout.complete(config)
    section, vocabulary = layout.read(config), config[layout.sizes["vocabulary"]]
    section, tensors = layout.received(section, files.read_tensors(folder, layout.buffers))
    model = Model(section, {}, vocabulary, layout.causal, config[layout.sizes["length"]])
    shapes = {path: x.shape for path, x in _flat(params(shell(model))).items()}
    rows = layout.tensors(section, shapes)
    layers = section["layers"]
    _check(tensors, {name: shape for row in rows for name, shape in _theirs(row, shapes[row.ours], layers)})
    tree: dict[str, Any] = {}
    for row in rows:
        *parents, leaf = row.ours.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(_ours(row, tensors, layers))
    return model._replace(params=tree)


def save(folder: Path | str, model: Model, coder: Tokenizer | None = None) -> str:
    """Write config.json and model.safetensors into a folder, and return the name of the architecture.

    The tokenizer is written to tokenizer.json and tokenizer_config.json, unless it is a SentencePiece model. Raises
    Refusal, and writes nothing, if no layout fits the model or the folder already holds one.
    """
    folder, section = settings.path(str(folder), f"save({str(folder)!r})"), model.section
    layout = _fitting(section, model.causal)
    flat = {path: np.asarray(x) for path, x in _flat(model.params).items()}
    if section["tied"]:
        # Transformers uses a tied table unscaled. The factor that is applied here is folded into the norm before it.
        scale = np.float32(1 / (section["embedding_scale"] * math.sqrt(section["width"])))
        norm = "transform.norm." if section["block"]["transform"] else "norm."
        flat |= {path: scale * x for path, x in flat.items() if path.startswith(norm)}
    config = layout.write(section, model.vocabulary, model.length)
    tensors: dict[str, np.ndarray] = {}
    for row in layout.tensors(section, flat):
        for layer, ours in enumerate(flat[row.ours] if row.layered else [flat[row.ours]]):
            tensors |= zip(row.names(layer), row.there(ours), strict=True)
    objects = {files.CONFIG: config}
    if coder is not None:
        config["eos_token_id"] = coder.separator
        objects |= vocabulary.files(coder, model.length, masked=model.vocabulary > coder.vocabulary)
    files.write(folder, objects, layout.sent(config, tensors))
    return layout.architecture


def make(model: Model) -> Transformer:
    """Build the Transformer of a model, with its parameters."""
    graph, _ = nnx.split(shell(model), nnx.Param)
    return nnx.merge(graph, nnx.State(model.params))


def params(transformer: Transformer) -> dict[str, Any]:
    """Return the tree of parameters of a model."""
    return nnx.to_pure_dict(nnx.state(transformer, nnx.Param))


def shell(model: Model) -> Transformer:
    """Return the Transformer with shapes in place of parameters. Raises Refusal if the section does not fit it."""
    section = dict(model.section)
    shape = check(**{key: section[key] for key in ("width", "heads", "head_size", "layers")}, causal=model.causal)
    config = {"model": section, "optimizer": {"accumulation_steps": 1}, "data": {"batch": 1, "length": model.length}}
    mesh = {"member": 1, "data": 1, "fsdp": 1, "tensor": 1}
    effects = positional.effects(section["position"], shape)
    kernel = execution.choose(config, effects, platform=jax.default_backend(), mesh=mesh, deterministic=False).kernel
    if "kernel" in section["attention"]:
        section["attention"] = {**section["attention"], "kernel": kernel}

    def build() -> Transformer:
        rngs = nnx.Rngs(params=0, position=0, features=0)
        given = {"vocabulary": model.vocabulary, "causal": model.causal, "layout": PLAIN, "rngs": rngs}
        return Transformer(**settings.bind(Transformer, section, "model", given))

    return nnx.eval_shape(build)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, with dots."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _layout(config: Mapping[str, Any]) -> Layout:
    """Return the layout of a config.json. Raises Refusal for another architecture."""
    kind = str(config.get("model_type"))
    if kind not in LAYOUTS:
        raise unknown("model_type in config.json", kind, LAYOUTS)
    layout, given = LAYOUTS[kind], config.get("architectures")
    if given and layout.architecture not in given:
        raise Refusal(f"config.json: architectures={given}: of {kind} only {layout.architecture} is read")
    return layout


def _fitting(section: Mapping[str, Any], causal: bool) -> Layout:
    """Return the layout that a model fits. Raises Refusal, with the reason for each layout, if it fits none."""
    reasons = {kind: layout.unlike(section, causal) for kind, layout in LAYOUTS.items()}
    for kind, reason in reasons.items():
        if reason is None:
            return LAYOUTS[kind]
    raise Refusal(
        f"position {section['position']['name']} with this model.block has no layout in Hugging Face transformers: "
        + "; ".join(f"in {kind} {reason}" for kind, reason in reasons.items())
    )


def _theirs(row: Tensor, shape: tuple[int, ...], layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the Hugging Face tensors that hold a parameter of this shape."""
    shapes = [x.shape for x in row.there(np.empty(shape[1:] if row.layered else shape, np.float32))]
    for layer in range(layers if row.layered else 1):
        yield from zip(row.names(layer), shapes, strict=True)


def _ours(row: Tensor, tensors: Mapping[str, np.ndarray], layers: int) -> np.ndarray:
    """Return one of our parameters, from the Hugging Face tensors that hold it."""
    slices = [row.here([tensors[name] for name in row.names(i)]) for i in range(layers if row.layered else 1)]
    return np.stack(slices) if row.layered else slices[0]


def _check(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise Refusal for a difference between the tensors of a file and those that its config.json asks for."""
    for names, problem in (
        (expected.keys() - tensors.keys(), f"{files.WEIGHTS} lacks"),
        (tensors.keys() - expected.keys(), "the model of config.json has no place for"),
    ):
        if names:
            first = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise Refusal(f"{problem} {first}{more}: the two files are not of one model")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise Refusal(
                f"{files.WEIGHTS}: {name} is {list(tensors[name].shape)}, config.json makes it {list(shape)}: the two "
                "files are not of one model"
            )
