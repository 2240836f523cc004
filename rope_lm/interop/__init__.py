"""Models in the layouts of Hugging Face transformers (Llama, GPT-NeoX, GPT-2, RoFormer), read and written without it.

`load` gives what makes the same logits here, `save` what makes the same logits there: the goldens of tests/goldens
hold both to it.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rope_lm import attention, positional
from rope_lm.interop import files
from rope_lm.interop.layouts import LAYOUTS, Layout
from rope_lm.interop.tensors import Tensor
from rope_lm.refusal import Refusal, unknown
from rope_lm.settings import bind
from rope_lm.transformer import Transformer

__all__ = ["LAYOUTS", "Model", "load", "make", "params", "save", "shell"]


class Model(NamedTuple):
    """A model as plain data."""

    section: Mapping[str, Any]  # `model` of a config
    params: Mapping[str, Any]  # the tree of parameters of one member, float32
    vocabulary: int
    causal: bool  # whether a token sees no token after it
    length: int  # the longest text that it is meant for, in tokens


def load(folder: Path) -> Model:
    """The model in a folder of config.json and model.safetensors.

    What the files do not say of the section (`dtype`, `remat`, the kernel) is as in configs/lm.py. Raises Refusal for
    an architecture or an option that has no counterpart here, and for tensors that are missing, that the config has no
    place for, or that are of another shape.
    """
    config = files.read_config(folder)
    layout = _layout(config)
    config = layout.complete(config)
    section, vocabulary = layout.read(config), config[layout.sizes["vocabulary"]]
    section, tensors = layout.received(section, files.read_tensors(folder, layout.buffers))
    model = Model(section, {}, vocabulary, layout.causal, config[layout.sizes["length"]])
    shapes = {path: x.shape for path, x in _flat(params(shell(model))).items()}
    rows = layout.tensors(section, shapes)
    layers = section["layers"]
    _check(tensors, {name: shape for row in rows for name, shape in _names(row, shapes[row.ours], layers)})
    tree: dict[str, Any] = {}
    for row in rows:
        *parents, leaf = row.ours.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(_ours(row, tensors, layers))
    return model._replace(params=tree)


def save(folder: Path, model: Model) -> str:
    """Writes config.json and model.safetensors into a folder; returns the name of what the model is there.

    Raises Refusal, and writes nothing, for a model that has no place in any layout, and where a model is already.
    """
    section = model.section
    layout = _place(section, model.causal)
    flat = {path: np.asarray(x) for path, x in _flat(model.params).items()}
    if section["tied"]:
        # Theirs multiplies with the table as it stands. What it is scaled by here goes into the norm before it.
        scale = np.float32(1 / (section["embedding_scale"] * math.sqrt(section["width"])))
        norm = "transform.norm." if section["block"]["transform"] else "norm."
        flat |= {path: scale * x for path, x in flat.items() if path.startswith(norm)}
    config = layout.write(section, model.vocabulary, model.length)
    tensors: dict[str, np.ndarray] = {}
    for row in layout.tensors(section, flat):
        for layer, ours in enumerate(flat[row.ours] if row.layered else [flat[row.ours]]):
            tensors |= zip((name.format(layer) for name in row.theirs), row.there(ours), strict=True)
    files.write(folder, config, layout.sent(config, tensors))
    return layout.architecture


def make(model: Model) -> Transformer:
    """The model to call."""
    graph, _ = nnx.split(shell(model), nnx.Param)
    return nnx.merge(graph, nnx.State(model.params))


def params(made: Transformer) -> dict[str, Any]:
    """The tree of parameters of a model."""
    return nnx.to_pure_dict(nnx.state(made, nnx.Param))


def shell(model: Model) -> Transformer:
    """The model without its parameters. Raises Refusal for a section that does not fit `Transformer`."""
    section = dict(model.section)
    head_size = section["width"] // section["heads"]
    encoding = positional.encoding(section["position"])
    kernel = attention.resolve(section["attention"], jax.default_backend(), section["dtype"], encoding, head_size)

    def build() -> Transformer:
        rngs = nnx.Rngs(params=0, position=0, features=0)
        given = {"vocabulary": model.vocabulary, "causal": model.causal, "rngs": rngs}
        return Transformer(**bind(Transformer, section | {"attention": kernel}, "model", given))

    return nnx.eval_shape(build)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree by their paths, with dots."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _layout(config: Mapping[str, Any]) -> Layout:
    """The layout of a config.json. Raises Refusal for another architecture."""
    kind = str(config.get("model_type"))
    if kind not in LAYOUTS:
        raise unknown("model_type in config.json", kind, LAYOUTS)
    layout, given = LAYOUTS[kind], config.get("architectures")
    if given and layout.architecture not in given:
        raise Refusal(f"config.json: architectures={given}: of {kind} only {layout.architecture} is read")
    return layout


def _place(section: Mapping[str, Any], causal: bool) -> Layout:
    """The layout that a model has a place in. Raises Refusal, with what hinders each, where there is none."""
    unlike = {kind: layout.unlike(section, causal) for kind, layout in LAYOUTS.items()}
    for kind, why in unlike.items():
        if why is None:
            return LAYOUTS[kind]
    raise Refusal(
        f"position {section['position']['name']} with this model.block has no layout in Hugging Face transformers: "
        + "; ".join(f"in {kind} {why}" for kind, why in unlike.items())
    )


def _names(row: Tensor, shape: tuple[int, ...], layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a parameter of this shape, and their shapes."""
    shapes = [x.shape for x in row.there(np.empty(shape[1:] if row.layered else shape, np.float32))]
    for layer in range(layers if row.layered else 1):
        yield from zip((name.format(layer) for name in row.theirs), shapes, strict=True)


def _ours(row: Tensor, tensors: Mapping[str, np.ndarray], layers: int) -> np.ndarray:
    one = lambda layer: row.here([tensors[name.format(layer)] for name in row.theirs])  # noqa: E731
    return np.stack([one(layer) for layer in range(layers)]) if row.layered else one(0)


def _check(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises Refusal for a difference between what a file holds and what its config.json asks for."""
    for names, what in (
        (wanted.keys() - tensors.keys(), "lacks"),
        (tensors.keys() - wanted.keys(), "has no place for"),
    ):
        if names:
            first = sorted(names)
            more = f" and {len(first) - 3} more" if len(first) > 3 else ""
            subject = files.WEIGHTS if what == "lacks" else "the model of config.json"
            raise Refusal(f"{subject} {what} {', '.join(first[:3])}{more}: the two files are not of one model")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise Refusal(
                f"{files.WEIGHTS}: {name} is {list(tensors[name].shape)}, config.json makes it {list(shape)}: the two "
                "files are not of one model"
            )
