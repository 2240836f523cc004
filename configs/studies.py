"""Studies: published claims, and the settings that they were made in.

python -m scripts.sweep --workdir=runs/replication --config=configs/studies.py:replication [--only=SETTING]

An arm is named SETTING/ARM, and arms are compared within their setting only. `tuned,scale=small,data=text:PATH` uses
another scale and text: run `tuned` there first, and put its best learning rates into TUNED.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import ablation, lm
from configs.ablation import Arm

STEPS = 500
EVALUATE = 25  # steps
BATCH, VALIDATION = 8, 64  # rows
SEEDS = (0, 1, 2, 3, 4, 5)  # six pairs: with five, an exact sign-flip p cannot be below 0.05
TUNING_SEEDS = (100, 101)  # used by no comparison
# The grid of each setting, the same for all its arms. A report says which best rates lie at its edge.
RATES = {
    "causal-softmax": (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    "causal-performer": (6e-3, 1.2e-2, 2.4e-2),
    "masked-softmax": (6e-3, 1.2e-2, 2.4e-2),
    "masked-performer": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
}

# Each arm's peak learning rate at scale=nano on stdlib: the best of RATES in results/tuned.
TUNED = {
    "causal-softmax": {
        "none": 6e-3,
        "learned": 2.4e-2,
        "sinusoidal": 1.2e-2,
        "relative_bias": 2.4e-2,
        "rotary": 1.2e-2,
    },
    "causal-performer": {
        "none": 6e-3,
        "learned": 2.4e-2,
        "sinusoidal": 1.2e-2,
        "rotary": 1.2e-2,  # before the feature map, as in the code that RoFormer cites
        "rotary_features": 6e-3,  # after it, as in RoFormer's Eq. 19
        "rotary_sinusoidal": 1.2e-2,  # before it, with sinusoids added, as that code ran
    },
    "masked-softmax": {
        "none": 6e-3,
        "learned": 6e-3,
        "sinusoidal": 6e-3,
        "rotary": 6e-3,
    },
    "masked-performer": {
        "none": 3e-3,
        "learned": 6e-3,
        "sinusoidal": 6e-3,
        "rotary": 6e-3,
        "rotary_features": 3e-3,
    },
}
# Width and layers; heads of 16. 0.04, 0.13, 0.38 and 0.85 million parameters on bytes.
SIZES = {"width32": (32, 2), "width64": (64, 2), "width96": (96, 3), "width128": (128, 4)}
EMBEDDING_SCALES = {"scale0_02": 0.02, "scale0_1": 0.1, "scale1": 1.0}
COMPARED = ("sinusoidal", "learned", "rotary")  # the arms of the two small studies
TIE = 0.05  # nats per token: a smaller difference in final loss counts as none


def replication(base: ConfigDict) -> Iterator[Arm]:
    """Yield two objectives x two kinds of attention, every encoding at its own tuned learning rate."""
    _begin(base, SEEDS)
    for setting, rates in TUNED.items():
        for name, rate in rates.items():
            yield f"{setting}/{name}", _over(base, setting, name, (rate,))


def tuned(base: ConfigDict) -> Iterator[Arm]:
    """Yield the grid that TUNED is chosen from: every arm of `replication` at every rate of its setting."""
    _begin(base, TUNING_SEEDS)
    for setting, rates in TUNED.items():
        for name in rates:
            yield f"{setting}/{name}", _over(base, setting, name, RATES[setting])


def sizes(base: ConfigDict) -> Iterator[Arm]:
    """Yield four sizes, three seeds. The best rate falls as 1/width (arXiv 2203.03466); TUNED has those of width 64."""
    _begin(base, SEEDS[:3])
    for size, (width, layers) in SIZES.items():
        shape = {"width": width, "hidden": 4 * width, "heads": width // 16, "layers": layers}
        for name in COMPARED:
            arm = _over(base, "causal-softmax", name, (TUNED["causal-softmax"][name] * 64 / width,))
            yield f"{size}/{name}", arm | {"model": arm["model"] | shape}


def embedding_scale(base: ConfigDict) -> Iterator[Arm]:
    """Yield three scales of token embeddings beside sinusoids of amplitude one, at the rates of scale 1."""
    _begin(base, SEEDS[:3])
    for setting, scale in EMBEDDING_SCALES.items():
        for name in COMPARED:
            arm = _over(base, "causal-softmax", name, (TUNED["causal-softmax"][name],))
            yield f"{setting}/{name}", arm | {"model": arm["model"] | {"embedding_scale": scale}}


def _begin(base: ConfigDict, seeds: tuple[int, ...]) -> None:
    base.steps, base.seeds = STEPS, seeds
    base.every.evaluate = EVALUATE
    base.data.batch, base.data.validation_rows = BATCH, VALIDATION


def _over(base: ConfigDict, setting: str, name: str, rates: tuple[float, ...]) -> dict[str, Any]:
    """Return what an arm of a setting, `OBJECTIVE-ATTENTION`, changes in the base."""
    objective, attention = setting.split("-")
    chosen = lm.get_config(f"objective={objective},attention={attention}")
    return {
        "objective": chosen.objective,
        "model": {"attention": chosen.model.attention, "position": lm.position(name, base.data)},
        "optimizer": {"learning_rate": rates},
    }


def _claim(setting: str, baseline: str, source: str, published: str) -> dict[str, Any]:
    """Return the claim that rotary takes fewer steps than `baseline`.

    relation: "above" (the outcome exceeds the threshold) or "within" (its magnitude does not: no difference).
    outcome: "steps", "seconds" or "flops" to the baseline's median final loss, as the ratio of the baseline's to the
    treatment's; or "final", the baseline's final loss minus the treatment's, in nats per token.
    """
    return {
        "treatment": "rotary",
        "baseline": baseline,
        "setting": setting,
        "outcome": "steps",
        "relation": "above",
        "threshold": 1.0,
        "source": source,
        "published": published,
    }


ROFORMER, ELEUTHER = "RoFormer, arXiv 2104.09864", "EleutherAI, Rotary Embeddings: A Relative Revolution"
HAVIV = "Haviv et al., arXiv 2203.16634"
OURS = "this study: rotary in the place of the learned positions of Haviv et al., arXiv 2203.16634"

# By study and name; written before the runs, except those of HAVIV. A sweep records when it first saw each claim, and a
# report marks those that came after its runs began.
CLAIMS = {
    "replication": {
        "roformer-masked": _claim(
            "masked-softmax", "sinusoidal", ROFORMER, "BERT base: rotary converges faster; a curve, one seed"
        ),
        "roformer-performer": _claim(
            "causal-performer",
            "sinusoidal",
            ROFORMER,
            'Performer on enwik8: "rapid convergence and lower loss"; a curve, one seed',
        )
        | {"treatment": "rotary_features"},
        "roformer-performer-as-run": _claim(
            "causal-performer",
            "sinusoidal",
            f"{ROFORMER}, by the code it cites",
            "rotary before the feature map, with sinusoids added",
        )
        | {"treatment": "rotary_sinusoidal"},
        "eleuther-learned": _claim("causal-softmax", "learned", ELEUTHER, "about 30% faster; 2.759 against 2.809 nats")
        | {"threshold": 1.3},
        "eleuther-t5": _claim("causal-softmax", "relative_bias", ELEUTHER, "10-20% faster; 2.759 against 2.801 nats")
        | {"threshold": 1.1},
        "alibi-tie": _claim(
            "causal-softmax",
            "sinusoidal",
            "ALiBi, arXiv 2108.12409",
            "a tie: perplexity 20.07 against 20.05 (-0.001 nats)",
        )
        | {"outcome": "final", "relation": "within", "threshold": TIE},
        "kerple-gap": _claim(
            "causal-softmax",
            "sinusoidal",
            "KERPLE, arXiv 2205.09921",
            "perplexity 24.2 against 33 (0.31 nats), five seeds",
        )
        | {"outcome": "final", "threshold": TIE},
        "haviv-masked": _claim("masked-softmax", "none", OURS, "they had no rotary")
        | {"outcome": "final", "threshold": 0.5},
        "haviv-causal": _claim("causal-softmax", "none", OURS, "they had no rotary")
        | {"outcome": "final", "relation": "within", "threshold": 0.1},
        "haviv-learned-masked": _claim(
            "masked-softmax", "none", HAVIV, "masked models without positions fail: perplexity 147 against 4 (3.6 nats)"
        )
        | {"treatment": "learned", "outcome": "final", "threshold": 0.5},
        "haviv-learned-causal": _claim(
            "causal-softmax", "none", HAVIV, "causal models do without: perplexity 20.97 against 20.42 (0.03 nats)"
        )
        | {"treatment": "learned", "outcome": "final", "relation": "within", "threshold": 0.1},
    },
    "sizes": {
        f"any-size-{size}": _claim(size, "sinusoidal", ROFORMER, "faster across architectures and setups")
        for size in SIZES
    },
    "embedding_scale": {
        "small-embeddings-gap": _claim(
            "scale0_02",
            "sinusoidal",
            "this study: sinusoids of amplitude 1 drown small embeddings",
            "KERPLE: 0.31 nats between them",
        )
        | {"outcome": "final", "threshold": TIE},
        "equal-embeddings-tie": _claim(
            "scale1",
            "sinusoidal",
            "this study: embeddings of the sinusoids' amplitude do not suffer",
            "ALiBi: -0.001 nats between them",
        )
        | {"outcome": "final", "relation": "within", "threshold": TIE},
    },
}
STUDIES = {"replication": replication, "tuned": tuned, "sizes": sizes, "embedding_scale": embedding_scale}


def get_config(text: str = "") -> ConfigDict:
    """Return the study `NAME` or `NAME,scale=...,data=...`, with the `claims` that its report gives verdicts on."""
    return ablation.sweep(text, STUDIES, CLAIMS)
