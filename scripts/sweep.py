"""Train every arm of a sweep, each in a process of its own.

    python -m scripts.sweep --workdir=runs/ablation --config=configs/ablation.py:quick

    --dry                  build every arm, print the plan with parameters and FLOPs, train nothing
    --at_once=2            train two arms side by side, each on half of the machine's GPUs, or of its cores
    --only=rotary,none     these arms alone; in a sweep of settings also a setting, or SETTING/ARM
    --config.base.X=Y      change the base config, and so every arm: --config.base.steps=500 --config.base.seeds=0,1
                           (refused where an arm sets X: --config.arms.rotary.optimizer.learning_rate=1e-3 changes that)

Sweeps are functions in configs/ablation.py: quick (five encodings x three seeds), tuning (the grid of learning rates
that quick's were chosen from), encodings (every encoding at one rate); and in configs/studies.py: replication (causal
and masked x softmax and Performer), tuned (its grid), sizes, embedding_scale. Before it starts it measures a step of
each setting and says how long the whole takes on this machine. One arm that fails does not stop the others, and
one that is killed is tried three times in all; running the command again goes on where it was stopped and does not redo
finished arms. Exit status: 0 all finished, 1 some failed or diverged, 2 a mistake in the command, 75 stopped.
"""

from absl import flags
from ml_collections import config_flags

from scripts import entry

CONFIG = config_flags.DEFINE_config_file("config", None, "a sweep's config file, then `:` and its name")
WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the sweep; each arm gets a folder in it")
DETERMINISTIC = flags.DEFINE_bool("deterministic", False, "as for scripts.train")
AT_ONCE = flags.DEFINE_integer("at_once", 1, "arms that are trained side by side, each on a share of the machine")
DRY = flags.DEFINE_bool("dry", False, "print the plan and train nothing")
ONLY = flags.DEFINE_list("only", None, "names of arms, with commas between them")


def main() -> int:
    config = entry.config(CONFIG)
    workdir = entry.required(WORKDIR)
    from rope_lm import launch, shares

    arms = launch.expand(config, ONLY.value, entry.overrides(CONFIG))
    if DRY.value:
        launch.show_plan(arms)
        return 0
    flags = ["--deterministic"] if DETERMINISTIC.value else []
    return launch.sweep(arms, config["claims"], workdir, flags, shares.equal(AT_ONCE.value))


if __name__ == "__main__":
    entry.start(main, __doc__)
