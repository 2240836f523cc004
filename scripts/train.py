"""Train one run: one encoding, one or several seeds.

    python -m scripts.train --workdir=runs/a --config=configs/lm.py:position=rotary,data=stdlib,scale=tiny

The config string picks, each from the table of its name in configs/presets.py,

{choices}
    data       stdlib, enwik8, text:PATH, tfds:NAME, probe:NAME

Flags fill in numbers; every key of configs/lm.py can be set:

    --config.steps=500  --config.seeds=0,1,2  --config.optimizer.learning_rate=1e-3  --config.model.position.base=5e5

--deterministic tells XLA to give the same bits each time on a GPU (slower; a CPU and a TPU do anyway), and records it.
--dry prints parameters, FLOPs and memory, --time the seconds of a step, measured; both keep nothing. Stop a run with
Ctrl-C or SIGTERM: it saves and exits with status 75; the same command goes on from there. A finished run is not run
again.
Exit status: 0 finished, 2 a mistake in the command, 4 diverged, 75 stopped, 1 anything else.
"""

import textwrap

from absl import flags
from ml_collections import config_flags

from configs.presets import ATTENTIONS, BLOCKS, OBJECTIVES, POSITIONS, SCALES
from rope_lm.refusal import Refusal
from scripts import entry

CONFIG = config_flags.DEFINE_config_file("config", None, "a config file, then `:` and its string", lock_config=True)
DETERMINISTIC = flags.DEFINE_bool("deterministic", False, "tell XLA to give the same bits each time, and record it")
DRY = flags.DEFINE_bool("dry", False, "print what would be trained, and train nothing")
TIME = flags.DEFINE_bool("time", False, "print the seconds of a step and nothing else, and keep nothing")
WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the run; made if it is not there")


CHOICES = {"position": POSITIONS, "scale": SCALES, "objective": OBJECTIVES, "attention": ATTENTIONS, "block": BLOCKS}


def main() -> int:
    config = entry.config(CONFIG)
    if "arms" in config:
        raise Refusal("--config is that of a sweep, which has arms: python -m scripts.sweep trains, or lists, them")
    if DRY.value:
        from rope_lm import launch

        launch.show_plan({"this run": config})
        return 0
    workdir = None if TIME.value else entry.required(WORKDIR)
    entry.huge_pages()
    from rope_lm import run  # JAX is imported after the flags were read: a mistake is answered at once

    entry.cores_as_devices(config)
    if cache := config.get("data", {}).get("cache"):  # without, the run is refused below
        entry.compilation_cache(cache)
    if TIME.value:
        print(run.seconds_per_step(run.plan(config)))
        return 0
    status = run.train(config, workdir, entry.provenance(CONFIG), DETERMINISTIC.value)
    why = f" ({status['why']})" if status["why"] else ""
    print(f"{workdir}: {status['status']} at step {status['step']}{why}")
    return {"finished": 0, "diverged": 4, "stopped": 75}[status["status"]]


def usage() -> str:
    """The help, with the names in the tables."""
    line = lambda key, table: textwrap.fill(f"{key:<10} {', '.join(table)}", 100, subsequent_indent=11 * " ")  # noqa: E731
    lines = (line(key, table) for key, table in CHOICES.items())
    return __doc__.format(choices=textwrap.indent("\n".join(lines), "    "))


if __name__ == "__main__":
    entry.start(main, usage())
