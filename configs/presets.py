"""The tables that a config string picks from: `position=rotary,data=stdlib,scale=tiny`."""

import re
from pathlib import Path
from typing import Any

from rope_lm.refusal import Refusal, unknown

# The keyword arguments of each encoding. Same keys as rope_lm.positional.ENCODINGS.
POSITIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "learned": {"limit": 0, "scale": 1.0},  # limit, and trained_length below, follow data.length (configs/lm.py)
    "sinusoidal": {"base": 10_000.0, "scale": 1.0},
    "relative_bias": {"buckets": 32, "max_distance": 128, "scale": 0.02},
    "alibi": {},
    "kerple_log": {},
    "kerple_power": {},
    "fire": {"hidden": 32, "threshold": 512.0},
    "continuous_bias": {"hidden": 32},
    "sandwich": {"size": 128},
    "rotary": {"base": 10_000.0},
    "rotary_partial": {"base": 10_000.0, "fraction": 0.25},
    "rotary_layered": {"bases": (10_000.0, 0.0)},  # every other layer has no position
    # Scaled for `factor` times the trained length.
    "rotary_linear": {"base": 10_000.0, "factor": 2.0},
    "rotary_ntk": {"base": 10_000.0, "factor": 2.0},
    "rotary_dynamic": {"base": 10_000.0, "factor": 2.0, "trained_length": 0},
    "yarn": {"base": 10_000.0, "factor": 2.0, "trained_length": 0, "beta_fast": 32.0, "beta_slow": 1.0},
    "llama3": {"base": 500_000.0, "factor": 8.0, "trained_length": 0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "rotary_features": {"base": 10_000.0},
    "rotary_sinusoidal": {"base": 10_000.0, "scale": 1.0},
    "xpos": {"base": 10_000.0, "fade": 512.0},
    "p_rope": {"base": 10_000.0, "fraction": 0.75},
    "shaw": {"max_distance": 64, "scale": 0.02},
    "transformer_xl": {"base": 10_000.0, "scale": 0.02},
    "cope": {"positions": 64, "scale": 0.0},
    "forgetting": {"gate_bias": 5.0},
}
FOR_FEATURES = ("rotary_features",)  # act on the features of attention=performer only

# Training objectives. Same keys as rope_lm.objective.OBJECTIVES.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "causal": {},
    "masked": {"mask_rate": 0.15, "mask_share": 0.8, "random_share": 0.1},  # BERT's shares
}

# Kinds of attention. Same keys as rope_lm.attention.ATTENTIONS.
ATTENTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"kernel": "auto"},  # auto, xla, blocked (CPU), cudnn (NVIDIA GPUs, bfloat16)
    "performer": {"features": 64, "redraw": 1000, "block": 64},  # per head; steps; tokens
}

# Kinds of layers: the keyword arguments of rope_lm.block.Style, as in the models that they are named after.
BLOCKS: dict[str, dict[str, Any]] = {
    "ours": {
        "norm": "rms",  # rms, layer
        "epsilon": 1e-6,
        "mlp": "gelu",  # gelu (by tanh), gelu_exact, swiglu
        "biases": False,  # on linear maps and on layer norms
        "residual": "pre",  # place of the norms: pre, parallel (attention beside the MLP), post
        "transform": False,  # BERT's head: linear map, activation and norm before the logits, and a bias on them
    },
    "llama": {
        "norm": "rms",
        "epsilon": 1e-6,
        "mlp": "swiglu",
        "biases": False,
        "residual": "pre",
        "transform": False,
    },
    "gpt2": {"norm": "layer", "epsilon": 1e-5, "mlp": "gelu", "biases": True, "residual": "pre", "transform": False},
    "neox": {
        "norm": "layer",
        "epsilon": 1e-5,
        "mlp": "gelu_exact",
        "biases": True,
        "residual": "parallel",
        "transform": False,
    },
    "bert": {
        "norm": "layer",
        "epsilon": 1e-12,
        "mlp": "gelu_exact",
        "biases": True,
        "residual": "post",
        "transform": True,
    },
}

# Model and batch shapes; the vocabulary is the data's. The quick ablation uses nano, the benchmark tiny. gpt2 has the
# layers of GPT-2 small: 85M parameters on bytes, 124M with data.tokenizer=bpe:50304 and model.tied=True (50,257, no
# multiple of 64, slows a GPU by a quarter; the standard library alone yields at most 41,292 BPE tokens).
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "nano": {"model": {"width": 64, "heads": 4, "layers": 2, "dtype": "float32"}, "data": {"length": 128, "batch": 16}},
    "tiny": {
        "model": {"width": 128, "heads": 4, "layers": 4, "dtype": "float32"},
        "data": {"length": 256, "batch": 16},
    },
    "small": {
        "model": {"width": 384, "heads": 6, "layers": 6, "dtype": "bfloat16"},
        "data": {"length": 512, "batch": 32},
    },
    "gpt2": {
        "model": {"width": 768, "heads": 12, "layers": 12, "dtype": "bfloat16"},
        "data": {"length": 1024, "batch": 32},
    },
    "1b": {
        "model": {"width": 2048, "heads": 16, "layers": 20, "dtype": "bfloat16"},
        "data": {"length": 2048, "batch": 64},
    },
}


def parse(text: str, allowed: dict[str, str]) -> dict[str, str]:
    """Parse `key=value,key=value` over the defaults in `allowed`. Raises Refusal for an unknown key.

    A comma inside a value (a path, say) is kept if no key=value follows it, or if the value is a path that is there.
    """
    chosen, where = dict(allowed), "key before '=' in the config string"
    parts = re.split(f",(?=(?:{'|'.join(allowed)})=)", text)
    for part in filter(None, (part.strip(",") for part in parts)):
        key, equals, value = part.partition("=")
        if not equals:
            raise Refusal(f"config string {text!r}: expected key=value,... with keys {', '.join(allowed)}")
        if key not in allowed:
            raise unknown(where, key, allowed)
        path = value.partition(":")[2]
        inside = [name for name in re.findall("(?<=,)[^,=]*(?==)", value) if name.isidentifier()]
        if inside and not (path and Path(path).expanduser().exists()):
            missing = f"; and there is no file {path!r}" if path else ""
            raise Refusal(f"{unknown(where, inside[-1], allowed)}{missing}")
        chosen[key] = value
    return chosen


def pick(what: str, name: str, table: dict[str, Any]) -> Any:
    """Return a row of a table. Raises Refusal with the nearest names if there is none."""
    if name not in table:
        raise unknown(what, name, table)
    return table[name]
