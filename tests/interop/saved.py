"""Every golden as `save` writes it, and a model of ours in every layout that fits it.

    python -m tests.interop.saved FOLDER

writes them into FOLDER with the expected logits, for tests/goldens/check_models.py.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.presets import BLOCKS
from rope_lm import interop
from tests import models

FOLDER = Path(__file__).parents[1] / "goldens" / "models"
GOLDENS = json.loads((FOLDER / "index.json").read_text())["models"]
# Blocks that have a layout, and the encodings that go with each. GPT-2's is also that of NeoX without parallel layers.
TURNED = ("rotary", "rotary_linear", "rotary_dynamic", "yarn", "llama3")
PLACES = {
    "llama": TURNED,
    "neox": (*TURNED, "rotary_partial"),
    "gpt2": ("learned", *TURNED, "rotary_partial"),
    "bert": ("rotary",),
}
OURS = {
    f"ours_{block}_{position}{'_tied' * tied}": (block, position, tied)
    for block, row in PLACES.items()
    for position in row
    for tied in (False, True)
}
# None is a layout's default, and each has an effect in heads of 8 and texts of models.LENGTH = 32.
NUMBERS = {
    "base": 100.0,
    "fraction": 0.5,
    "factor": 4.0,
    "trained_length": 12,
    "beta_fast": 0.5,
    "beta_slow": 0.125,
    "low_freq_factor": 0.1,
    "high_freq_factor": 1.0,
    "scale": 0.7,
}
EPSILON = 0.01


def ours(preset: str, position: str, **changes: Any) -> interop.Model:
    """Return a model of this project with random parameters everywhere."""
    row = models.position(position)
    row |= {key: NUMBERS[key] for key in row.keys() & NUMBERS.keys()}
    if preset == "bert":
        row["base"] = 10_000.0  # RoFormer has no other
    section = models.section(
        position,
        **{
            "position": row,
            "block": BLOCKS[preset] | {"epsilon": EPSILON},
            "hidden": 48,
            "embedding_scale": 0.7,
        }
        | changes,
    )
    model = interop.Model(section, {}, models.VOCABULARY, preset != "bert", models.LENGTH)
    shapes, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(interop.shell(model), nnx.Param)))
    draw = np.random.default_rng(0)
    return model._replace(
        params=jax.tree.unflatten(tree, [jnp.asarray(0.3 * draw.normal(size=x.shape), x.dtype) for x in shapes])
    )


def logits(model: interop.Model, tokens: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: interop.make(model)(tokens)[0])(tokens))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for name in GOLDENS:
        interop.save(out / name, interop.load(FOLDER / name))
        shutil.copy(FOLDER / name / "logits.npz", out / name)
    for name, (block, position, tied) in OURS.items():
        model, tokens = ours(block, position, tied=tied), models.tokens(2)
        interop.save(out / name, model)
        np.savez_compressed(out / name / "logits.npz", tokens=tokens, logits=logits(model, tokens))
