"""Print the table of encodings: tests, cost and result of each; draw how each changes a score with distance."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/encodings.py`

import json
from typing import Any

import numpy as np

from rope_lm.positional.rotary import frequencies, upper_bound
from rope_lm.refusal import Refusal
from scripts import entry

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  python -m scripts.encodings
  python -m scripts.encodings --report=report/summary.json --benchmark=bench/benchmark.json
  python -m scripts.encodings --out=results/encodings        decay.svg, decay.png, shift_invariant.json besides

Shift invariance is measured here: the logits of a small random model when all positions are shifted by 1,000 tokens.
exit status: 0, or 2 for a mistake in the command."""
HEAD = 64  # size of a head in the figure
UNSHAPED = ("relative_bias", "fire", "continuous_bias")  # their curves are random before training


def main() -> int:
    parser = entry.parser("encodings", __doc__, EXAMPLES)
    archive = ROOT / "results/encodings"
    parser.add_argument("--report", type=entry.path, default=archive / "summary.json", help="summary.json of a report")
    parser.add_argument("--benchmark", type=entry.path, default=archive / "benchmark.json", help="its JSON")
    parser.add_argument("--out", type=entry.path, help="a folder for the files above (nothing is written)")
    arguments = parser.parse_args()
    from rope_lm import environment
    from rope_lm.analysis import documents
    from rope_lm.positional import ENCODINGS

    environment.pin()
    report, benchmark = documents.summary(arguments.report), documents.read(arguments.benchmark)
    goldens = documents.read(ROOT / "tests/goldens/index.json")
    invariant = {name: shift_invariant(name) for name in ENCODINGS}
    print(documents.encoding_table(report, benchmark, goldens, invariant), end="")
    if arguments.out:
        _write(arguments.out, invariant)
    return 0


def _write(out: Path, invariant: dict[str, bool]) -> None:
    from rope_lm.analysis import figures
    from rope_lm.positional import ENCODINGS

    identity = ENCODINGS["none"]
    distances = np.unique(np.geomspace(1, 1024, 120).round().astype(int)) - 1
    kept, added = {}, {}
    for name, cls in ENCODINGS.items():
        if cls.turn_features is not identity.turn_features or cls.score is not identity.score:
            continue  # their effect depends on the tokens
        encoding = _encoding(name)
        if cls.rotate is not identity.rotate:
            kept[name] = _kept(encoding, distances)
        elif cls.bias is not identity.bias and name not in UNSHAPED:
            added[name] = _added(encoding, distances)
    bound = upper_bound(frequencies(HEAD, 10_000.0), distances)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "shift_invariant.json").write_text(json.dumps(invariant, indent=1) + "\n", encoding="utf-8")
        figures.save(figures.decay(distances, kept, bound / bound[0], added), out / "decay")
    except OSError as error:
        raise Refusal(f"--out={str(out)!r} cannot be written ({error.strerror}): choose another folder") from error


def _encoding(name: str) -> Any:
    """Build an encoding from its config row, as a layer sees it, for eight heads of size 64."""
    from flax import nnx

    from configs.presets import POSITIONS
    from rope_lm import positional

    lengths = {key: 1024 for key in ("limit", "trained_length") if key in POSITIONS[name]}
    row = {"name": name, **POSITIONS[name]} | lengths
    row |= {"bases": POSITIONS[name]["bases"][:1]} if "bases" in row else {}
    shape = positional.Shape(8 * HEAD, 8, HEAD, layers=1, causal=True)
    encoding = positional.make(row, shape=shape, rngs=nnx.Rngs(0, position=1))
    return positional.at_layer(encoding, 0)


def _kept(encoding: Any, distances: np.ndarray) -> np.ndarray:
    """Return the share of a vector's score with itself that is left at each distance, on average over vectors."""
    import jax.numpy as jnp

    from rope_lm.positions import Positions, View

    def at(index: int) -> Positions:
        return Positions(jnp.array([[index]]), jnp.ones((1, 1), jnp.int32))

    basis = jnp.eye(HEAD)[None, None]  # its mean over unit vectors is that over all directions
    scores = []
    for distance in distances:
        q, k = encoding.rotate(basis, basis, View(at(int(distance)), at(0), causal=True))
        scores.append(float((q * k).sum(-1).mean()))
    return np.array(scores) / scores[0]


def _added(encoding: Any, distances: np.ndarray) -> np.ndarray:
    """Return what is added to a logit at each distance, minus that at distance 0, by head [N, distances]."""
    from rope_lm.positions import View, contiguous

    text = contiguous(int(distances.max()) + 1)
    bias = np.asarray(encoding.bias(View(text[-1:], text, causal=True)))[0, :, 0, ::-1][:, distances]
    return bias - bias[:, :1]


def shift_invariant(name: str) -> bool:
    """Return True if shifting all positions by 1,000 tokens does not change the logits of a random model."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from configs import lm
    from configs.presets import POSITIONS
    from rope_lm.positions import contiguous
    from rope_lm.transformer import Transformer

    row = {"name": name, **POSITIONS[name]} | ({"limit": 1100} if "limit" in POSITIONS[name] else {})
    row |= {"trained_length": 32} if "trained_length" in row else {}
    row |= {"scale": 1.0} if "scale" in row else {"threshold": 8.0} if "threshold" in row else {}
    attention = "performer" if name == "rotary_features" else "softmax"
    section = entry.plain(lm.get_config(f"attention={attention}").model)
    section |= {"width": 32, "heads": 4, "layers": 2, "hidden": 64, "position": row}
    section["attention"] |= {"kernel": "xla"} if attention == "softmax" else {}
    rngs = nnx.Rngs(params=0, position=1, features=2)
    model = Transformer(**section, causal=True, vocabulary=17, rngs=rngs)
    tokens = jax.random.randint(jax.random.key(2), (1, 32), 0, 17)
    here, there = (model(tokens, contiguous(32, start))[0] for start in (0, 1000))
    return bool(jnp.abs(here - there).max() < 1e-3)


if __name__ == "__main__":
    entry.end(main)
