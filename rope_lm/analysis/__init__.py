"""Runs to tables, figures and the report. Reads run directories only, and never imports JAX. In a notebook:

>>> from rope_lm.analysis import compare, figures, load, table
>>> arms = compare(load("runs/quick"), treatment="rotary")
>>> arms["learned"].speedup, figures.speedups(arms), table(load("runs/quick"))

A setting of a study is a folder of its own, `load("runs/replication/causal-softmax")`; `results/replication` is read
as its runs are. `table` gives a list of dicts: `pandas.DataFrame(table(...))`.
"""

from rope_lm.analysis import figures
from rope_lm.analysis.claims import judge_all
from rope_lm.analysis.comparison import compare, sensitivity, tune
from rope_lm.analysis.runs import load, load_all, table

__all__ = ["compare", "figures", "judge_all", "load", "load_all", "sensitivity", "table", "tune"]
