"""One run: a language model with one positional encoding.

python -m scripts.train --workdir=runs/a --config=configs/lm.py:position=rotary,data=stdlib,scale=tiny

The string picks rows of tables (position, data, scale, objective, attention, block); flags set single values:
--config.steps=500
"""

import os
from typing import Any

from ml_collections import ConfigDict, config_dict

from configs.presets import ATTENTIONS, BLOCKS, OBJECTIVES, POSITIONS, SCALES, parse, pick

DEFAULTS = {
    "position": "rotary",
    "data": "stdlib",
    "scale": "nano",
    "objective": "causal",
    "attention": "softmax",
    "block": "ours",
}


def named(what: str, name: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return a table's row as a section, with its name."""
    return {"name": name, **pick(what, name, table)}


def position(name: str, data: ConfigDict) -> dict[str, Any]:
    """Return a row of POSITIONS. Learned or trained lengths follow the length of the data's rows."""
    row = named("position", name, POSITIONS)
    return row | {key: data.get_ref("length") for key in ("limit", "trained_length") if key in row}


def cache() -> str:
    """Return the folder for prepared text: in XDG_CACHE_HOME, which has to be absolute, or else in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return f"{home if os.path.isabs(home) else '~/.cache'}/rope_lm"


def hidden(width: Any, mlp: str) -> Any:
    """Return the MLP's width: four times the model's.

    SwiGLU has three matrices instead of two, so it gets two thirds of that, in multiples of 8, for about as many
    parameters (arXiv 2002.05202, section 3).
    """
    return width * 8 // 3 // 8 * 8 if mlp == "swiglu" else width * 4


def get_config(text: str = "") -> ConfigDict:
    """Return the config that `position=...,data=...,scale=...` names. The library has no values of its own."""
    chosen = parse(text, DEFAULTS)
    scale = pick("scale", chosen["scale"], SCALES)
    config = ConfigDict()
    config.steps = 2000
    config.seeds = (0,)  # one member of the ensemble per seed (initial values and data order) and peak learning rate
    config.data = ConfigDict(
        {
            "name": chosen["data"],  # stdlib, enwik8, text:PATH (a file, a folder or a .zip), tfds:NAME, probe:NAME
            "split": "",  # tfds only: a split expression that is divided 90/5/5; "" is the dataset's own splits
            "field": "",  # tfds only: the feature that is text; "" is the only one
            "tokenizer": "bytes",  # bytes, bpe:SIZE (trained on the text), sentencepiece:PATH (a .model file)
            "length": scale["data"]["length"],  # tokens
            "batch": scale["data"]["batch"],  # rows a step, of each member
            "validation_rows": 128,  # rows, the same for every arm and seed
            "cache": cache(),
        }
    )
    config.objective = ConfigDict(named("objective", chosen["objective"], OBJECTIVES))
    config.model = ConfigDict(
        {
            "width": scale["model"]["width"],
            "heads": scale["model"]["heads"],
            "head_size": config_dict.placeholder(int),  # None: width / heads
            "layers": scale["model"]["layers"],
            "position": position(chosen["position"], config.data),
            "tied": False,
            "embedding_scale": 1.0,  # initial standard deviation of the token embeddings, in every arm
            # Of activations and of the product that makes logits. Parameters, sums and softmax are float32.
            "dtype": scale["model"]["dtype"],
            # Values kept for the backward pass: none (all), products (of matrices), full (layer inputs only). Unrolled
            # layers (rope_lm/execution.py) keep what XLA likes, unless it is full.
            "remat": "products",
            "attention": named("attention", chosen["attention"], ATTENTIONS),
            "block": dict(pick("block", chosen["block"], BLOCKS)),
        }
    )
    # Follows the width unless it is set.
    config.model.hidden = hidden(config.model.get_ref("width"), config.model.block.mlp)
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": (3e-3,),  # peaks; several make an ensemble
            "schedule": "cosine",  # constant, cosine, wsd
            "warmup": 0.05,  # fraction of the steps
            "cooldown": 0.2,  # fraction of the steps after the warm-up; wsd only
            "weight_decay": 0.1,  # of matrices, except an encoding's own
            "b1": 0.9,
            "b2": 0.95,
            "epsilon": 1e-8,
            "gradient_clip": 1.0,  # global norm; 1e9 clips nothing
            "accumulation_steps": 1,  # equal pieces of a batch, one after another
        }
    )
    config.every = ConfigDict({"evaluate": 50, "save": 500, "log": 20})  # steps
    config.mesh = ConfigDict({"member": 1, "data": -1, "fsdp": 1, "tensor": 1})  # -1: the devices that are left
    return config
