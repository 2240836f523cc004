"""Train every arm of a sweep, each in its own process.

    python -m scripts.sweep --workdir=runs/ablation --config=configs/ablation.py:quick

    --dry                  build and compile every arm, print parameters, FLOPs and memory, train nothing
    --at_once=2            train two arms side by side, each on half of the machine's GPUs or cores
    --only=rotary,none     train these arms only; in a sweep of settings also a setting, or SETTING/ARM
    --config.base.X=Y      change the base config, and so every arm: --config.base.steps=500 --config.base.seeds=0,1
                           (refused if an arm sets X: --config.arms.rotary.optimizer.learning_rate=1e-3 changes that)

Sweeps are functions in configs/ablation.py: quick (five encodings, three seeds), tuning (the grid of learning rates
that quick's were chosen from), encodings (every encoding at one learning rate); and in configs/studies.py: replication
(causal and masked, softmax and Performer), tuned (its grid), sizes, embedding_scale. Before it starts, the sweep
measures a step of each setting and says how long the whole takes on this machine. An arm that fails does not stop the
others, and an arm that is killed is tried three times in all. The same command goes on where a sweep was stopped, and
does not repeat finished arms. Ctrl-C stops it: arms that train save, all are listed, and the status is 75. So do
SIGTERM, SIGHUP (a closed terminal; not under nohup), SIGUSR1, SIGUSR2 and SIGXCPU (a scheduler's warnings).
Exit status: 0 all finished, 1 some failed or diverged, 2 a mistake in the command, 75 stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/sweep.py`

from absl import flags
from ml_collections import config_flags

from rope_lm.sweep.main import LAUNCHERS, sweep
from scripts import entry

CONFIG = config_flags.DEFINE_config_file("config", None, "a sweep's config file, then `:` and the name of the sweep")
WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the sweep; each arm gets a folder in it")
DETERMINISTIC = flags.DEFINE_bool("deterministic", False, "as for scripts.train")
ON = flags.DEFINE_enum("on", "local", list(LAUNCHERS), "where the arms train; local is this machine")
AT_ONCE = flags.DEFINE_integer("at_once", 1, "arms that are trained side by side, each on a share of the machine")
DRY = flags.DEFINE_bool("dry", False, "print the plan and train nothing")
ONLY = flags.DEFINE_list("only", None, "names of arms, separated by commas")


def main() -> int:
    config = entry.config(CONFIG)
    root = entry.workdir(WORKDIR)
    from rope_lm.sweep import arms, tables

    expanded = arms.expand(config, ONLY.value, entry.overrides(CONFIG))
    if DRY.value:
        entry.cores_as_devices(*expanded.values())
        if cache := config["base"].get("data", {}).get("cache"):  # the arms then find their programs compiled
            entry.compilation_cache(cache)
        tables.show_plan(expanded)
        return 0
    flags = ["--deterministic"] if DETERMINISTIC.value else []
    return sweep(expanded, config["claims"], root, LAUNCHERS[ON.value](root, AT_ONCE.value, flags))


if __name__ == "__main__":
    entry.start(main, __doc__ or "")
