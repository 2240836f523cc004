"""Sweeps: one base config, the arms that differ from it, and the seeds and learning rates that every arm runs.

python -m scripts.sweep --workdir=runs/ablation --config=configs/ablation.py:quick [--dry] [--only=rotary,none]

`quick,scale=small,data=text:PATH` uses another scale or text. The learning rates in TUNED are for scale=nano on stdlib:
run `tuning,scale=small,...` first and put its best rates here. An arm is {section: {key: value}} over the base.
--config.base.steps=500 changes the base, and so every arm; it is refused if an arm has a value of its own.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import lm
from configs.presets import FOR_FEATURES, POSITIONS, pick
from rope_lm.refusal import Refusal

Arm = tuple[str, dict[str, Any]]

# Peak learning rates at scale=nano, 2000 steps: the best of RATES in results/tuning (seeds 100 and 101).
TUNED = {"none": 6e-3, "learned": 2.4e-2, "sinusoidal": 1.2e-2, "relative_bias": 1.2e-2, "rotary": 1.2e-2}
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)


def quick(base: ConfigDict) -> Iterator[Arm]:
    """Yield five encodings x three seeds, each encoding at its own tuned learning rate."""
    base.seeds = (0, 1, 2)
    for name, rate in TUNED.items():
        yield name, _position(name, base) | {"optimizer": {"learning_rate": (rate,)}}


def tuning(base: ConfigDict) -> Iterator[Arm]:
    """Yield the grid that TUNED was chosen from: every encoding at every rate, on seeds that no comparison uses."""
    base.seeds = (100, 101)
    base.optimizer.learning_rate = RATES
    for name in TUNED:
        yield name, _position(name, base)


def encodings(base: ConfigDict) -> Iterator[Arm]:
    """Yield every encoding of softmax attention at one learning rate, that of most of TUNED, for half of quick's steps.

    Other encodings may do better at rates of their own. All take about an hour on two slow cores.
    """
    base.seeds, base.steps = (0, 1, 2), 1000
    base.optimizer.learning_rate = (1.2e-2,)
    for name in (each for each in POSITIONS if each not in FOR_FEATURES):
        yield name, _position(name, base)


def probes(base: ConfigDict) -> Iterator[Arm]:
    """Yield the encodings of TUNED on a task that needs positions, at one learning rate.

    The task is copy, or that of `probes,data=probe:NAME`; read the result with `python -m scripts.probe`. In rows of 32
    tokens, copy and reverse are learned in these steps. In rows of 128 they are not, and induction is in neither.
    """
    base.seeds, base.steps, base.data.length, base.optimizer.learning_rate = (0, 1, 2), 1500, 32, (6e-3,)
    if not base.data.name.startswith("probe:"):
        base.data.name = "probe:copy"
    for name in TUNED:
        yield name, _position(name, base)


SWEEPS = {"quick": quick, "tuning": tuning, "encodings": encodings, "probes": probes}


def _position(name: str, base: ConfigDict) -> dict[str, Any]:
    return {"model": {"position": lm.position(name, base.data)}}


def sweep(text: str, sweeps: dict[str, Callable], claims: dict[str, dict[str, Any]]) -> ConfigDict:
    """Return the sweep that `NAME,scale=...,data=...` names.

    `base`: a config as in configs/lm.py; `arms`: what each changes in it; `claims`: what its report gives a verdict on
    (configs/studies.py).
    """
    name, _, shape = text.partition(",")
    if not name:
        raise Refusal(f"the config is one of several sweeps: add :NAME to its file, one of {', '.join(sweeps)}")
    arms, base = pick("sweep", name, sweeps), lm.get_config(shape)
    return ConfigDict({"base": base, "arms": dict(arms(base)), "claims": claims.get(name, {})})


def get_config(text: str = "") -> ConfigDict:
    """Return the sweep `NAME` or `NAME,scale=...,data=...`."""
    return sweep(text, SWEEPS, {})
