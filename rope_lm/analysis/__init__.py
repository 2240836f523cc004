"""Runs to tables, figures and the report. Reads run directories only, and never imports JAX.

>>> from rope_lm.analysis import load, compare, figures
>>> arms = compare(load("runs/quick"), treatment="rotary")
>>> [(arm.name, arm.final.mean, arm.speedup) for arm in arms]; figures.loss_curves(arms)
"""

from rope_lm.analysis import figures
from rope_lm.analysis.comparison import compare, tune
from rope_lm.analysis.runs import load

__all__ = ["compare", "figures", "load", "tune"]
