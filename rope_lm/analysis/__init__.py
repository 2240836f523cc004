"""Tables, figures and reports of runs. Reads run directories only, and never imports JAX. In a notebook:

>>> from rope_lm.analysis import compare, figures, load, table
>>> arms = compare(load("runs/quick"), treatment="rotary")
>>> arms["learned"].speedup, figures.speedups(arms), table(load("runs/quick"))

Each setting of a study is its own folder, `load("runs/replication/causal-softmax")`. An archive, `results/replication`,
is read in the same way. `table` returns a list of dicts: `pandas.DataFrame(table(...))`.
"""

from rope_lm.analysis import figures
from rope_lm.analysis.archive import load, load_all
from rope_lm.analysis.claims import judge_all
from rope_lm.analysis.comparison import compare
from rope_lm.analysis.runs import table
from rope_lm.analysis.tuning import sensitivity, tune

__all__ = ["compare", "figures", "judge_all", "load", "load_all", "sensitivity", "table", "tune"]
