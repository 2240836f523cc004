"""Train one run: one encoding, one or several seeds.

    python -m scripts.train --workdir=runs/a --config=configs/lm.py:position=rotary,data=stdlib,scale=tiny

The config string picks a row from each of these tables of configs/presets.py:

{choices}
    data       stdlib, enwik8, text:PATH, tfds:NAME, probe:NAME

Flags change numbers; every key of configs/lm.py can be set:

    --config.steps=500  --config.seeds=0,1,2  --config.optimizer.learning_rate=1e-3  --config.model.position.base=5e5

--deterministic makes XLA give the same bits each time on a GPU (slower; a CPU and a TPU do anyway), and records it.
--dry prints parameters, FLOPs and memory; --time measures the seconds of a step. Both write nothing. A finished run
is not trained again.

Stop a run with Ctrl-C: it saves and exits with status 75, and the same command goes on from there. So do SIGTERM,
SIGHUP (a closed terminal; not under nohup), SIGUSR1, SIGUSR2 and SIGXCPU (a scheduler's warnings).
Exit status: 0 finished, 2 a mistake in the command, 4 diverged, 75 stopped, 1 anything else.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/train.py`

import textwrap

from absl import flags
from ml_collections import config_flags

from configs.presets import ATTENTIONS, BLOCKS, OBJECTIVES, POSITIONS, SCALES
from rope_lm.provenance import provenance
from rope_lm.refusal import Refusal
from scripts import entry

CONFIG = config_flags.DEFINE_config_file("config", None, "a config file, then `:` and its string", lock_config=True)
DETERMINISTIC = flags.DEFINE_bool("deterministic", False, "make XLA give the same bits each time, and record it")
DRY = flags.DEFINE_bool("dry", False, "print what would be trained, and train nothing")
TIME = flags.DEFINE_bool("time", False, "print the seconds of a step and nothing else; write nothing")
WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the run; created if it is missing")

CHOICES = {"position": POSITIONS, "scale": SCALES, "objective": OBJECTIVES, "attention": ATTENTIONS, "block": BLOCKS}


def main() -> int:
    config = entry.config(CONFIG)
    if "arms" in config:
        raise Refusal("--config is that of a sweep, which has arms: python -m scripts.sweep trains, or lists, them")
    workdir = Path() if DRY.value or TIME.value else entry.workdir(WORKDIR)
    entry.huge_pages()
    from rope_lm import loop, plan, timing  # they import JAX; a mistake in the flags is answered before that
    from rope_lm.sweep import tables

    entry.cores_as_devices(config)
    if cache := config.get("data", {}).get("cache"):  # a config without it is refused below
        entry.compilation_cache(cache)
    if DRY.value:
        tables.show_plan({"this run": config})
        return 0
    if TIME.value:
        print(timing.seconds_per_step(plan.plan(config)))
        return 0
    status = loop.train(config, workdir, provenance(sys.argv, entry.overrides(CONFIG)), DETERMINISTIC.value)
    why = f" ({status['why']})" if status["why"] else ""
    print(f"{WORKDIR.value}: {status['status']} at step {status['step']}{why}")
    return {"finished": 0, "diverged": 4, "stopped": 75}[status["status"]]


def usage() -> str:
    """Return the help, with the names in the tables."""
    lines = (f"    {key:<10} {', '.join(table)}" for key, table in CHOICES.items())
    choices = "\n".join(textwrap.fill(line, 104, subsequent_indent=15 * " ") for line in lines)
    return (__doc__ or "").format(choices=choices)


if __name__ == "__main__":
    entry.start(main, usage())
