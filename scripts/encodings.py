"""Print the table of encodings that README.md shows: what is proved of each, what it costs, what it learned; and draw
what each does to a score as its two tokens move apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rope_lm.positional.rotary import frequencies, upper_bound
from rope_lm.refusal import Refusal
from scripts import entry

ROOT = Path(__file__).parents[1]
EXAMPLES = """examples:
  python -m scripts.encodings
  python -m scripts.encodings --report=report/summary.json --benchmark=bench/benchmark.json
  python -m scripts.encodings --out=results/encodings        decay.svg and decay.png besides

Shift-invariance is measured here: logits of a small random model when all positions are shifted by 1,000 tokens.
exit status: 0, or 2 for a mistake in the command."""
HEAD = 64  # size of a head in the figure
UNSHAPED = ("relative_bias", "fire", "continuous_bias")  # whose curve is random before training
HEADS = ("encoding", "held against", "shift-invariant", "its parameters", "step over none", "final nats", "read at 4x")


def main() -> int:
    parser = entry.parser("encodings", __doc__, EXAMPLES)
    parser.add_argument(
        "--report", default=str(ROOT / "results/encodings/summary.json"), help="summary.json of a report"
    )
    parser.add_argument("--benchmark", default=str(ROOT / "results/encodings/benchmark.json"), help="its JSON")
    parser.add_argument("--out", type=Path, help="a folder for the figure of decay (nothing is drawn)")
    arguments = parser.parse_args()
    arms = {arm["encoding"]: arm for arm in _read(arguments.report, "arms")}
    measured = [row for row in _read(arguments.benchmark, "rows") if row.get("overhead") is not None]
    speeds = {row["encoding"]: row for row in measured if row["scale"] == "tiny"}
    goldens = json.loads((ROOT / "tests/goldens/index.json").read_text())["goldens"]
    sources = {golden["position"]["name"]: golden["source"] for golden in reversed(goldens.values())}
    from rope_lm.positional import ENCODINGS

    print("| " + " | ".join(HEADS) + " |")
    print("|" + "---|" * len(HEADS))
    for name in ENCODINGS:
        arm, speed = arms.get(name), speeds.get(name)
        cells = [
            name,
            ", ".join(sources.get(name, "").split(", ")[:2]).split("(")[0].strip(),  # what, and where in it
            "yes" if shift_invariant(name) else "no",
            f"{arm['parameters_position']:,}" if arm else "",
            f"{100 * speed['overhead']:+.1f}%" if speed and name != "none" else "",
            f"{arm['final_nats']['mean']:.3f}" if arm else "",
            _longer(arm["beyond"]) if arm else "",
        ]
        print("| " + " | ".join(cells) + " |")
    if arguments.out:
        _draw(arguments.out)
    return 0


def _draw(out: Path) -> None:
    from rope_lm.analysis import figures
    from rope_lm.positional import ENCODINGS

    distances = np.unique(np.geomspace(1, 1024, 120).round().astype(int)) - 1
    kept, added = {}, {}
    for name, cls in ENCODINGS.items():
        if cls.turns_features() or cls.score is not ENCODINGS["none"].score:
            continue  # what these do hangs on the tokens
        made = _made(name)
        if cls.rotate is not ENCODINGS["none"].rotate:
            kept[name] = _kept(made, distances)
        elif cls.bias is not ENCODINGS["none"].bias and name not in UNSHAPED:
            added[name] = _added(made, distances)
    bound = upper_bound(frequencies(HEAD, 10_000.0), distances)
    try:
        out.mkdir(parents=True, exist_ok=True)
        figures.save(figures.decay(distances, kept, bound / bound[0], added), out / "decay")
    except OSError as error:
        raise Refusal(f"--out={str(out)!r} cannot be written ({error.strerror}): choose another folder") from error


def _made(name: str) -> Any:
    """An encoding with its config row, for one layer of eight heads of 64."""
    from flax import nnx

    from configs.presets import POSITIONS
    from rope_lm import positional

    row = {"name": name, **POSITIONS[name]} | {
        key: 1024 for key in ("limit", "trained_length") if key in POSITIONS[name]
    }
    row |= {"bases": POSITIONS[name]["bases"][:1]} if "bases" in row else {}
    shape = positional.Shape(8 * HEAD, 8, HEAD, layers=1, causal=True)
    return positional.make(row, shape=shape, rngs=nnx.Rngs(0, position=1))


def _kept(made: Any, distances: np.ndarray) -> np.ndarray:
    """The share that is left of the score of a vector with itself, on average over vectors: a key at index 0, queries
    further and further from it."""
    import jax.numpy as jnp

    from rope_lm.positions import Positions

    at = lambda index: Positions(jnp.asarray(index)[None], jnp.ones((1, len(index)), jnp.int32))  # noqa: E731
    basis = jnp.eye(HEAD)[None, None]  # its mean over unit vectors is that over all directions
    left = []
    for distance in distances:
        q, k = made.rotate(basis, basis, at([int(distance)]), at([0]), jnp.int32(0))
        left.append(float((q * k).sum(-1).mean()))
    return np.array(left) / left[0]


def _added(made: Any, distances: np.ndarray) -> np.ndarray:
    """What is added to a logit, less what is added at distance 0, by head [N, distances]: the last query of a text."""
    from rope_lm.positions import contiguous

    where = contiguous(int(distances.max()) + 1)
    bias = np.asarray(made.bias(where[-1:], where))[0, :, 0, ::-1][:, distances]
    return bias - bias[:, :1]


def _read(path: str, key: str) -> list[dict[str, Any]]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(
            f"{path!r} cannot be read ({error}): give the file that a report, or the benchmark, wrote"
        ) from error


def _longer(rows: list[dict[str, Any]]) -> str:
    """What reading four times the trained length adds to the loss."""
    mean = {row["multiple"]: sum(row["apart"]) / len(row["apart"]) for row in rows if not row["scaling"]}
    return f"{mean[4] - mean[1]:+.2f}" if {1, 4} <= mean.keys() else "refused" if 1 in mean else ""


def shift_invariant(name: str) -> bool:
    """Whether a shift of all positions by 1,000 tokens leaves the logits of a random model as they were."""
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
