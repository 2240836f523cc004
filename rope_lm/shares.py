"""Equal shares of this machine, for processes that compute side by side."""

import os
import subprocess
from typing import NamedTuple

from rope_lm import machine
from rope_lm.refusal import Refusal


class Share(NamedTuple):
    """What a process may use of the machine: some of its GPUs, or of its cores. The whole machine, if nothing is
    said."""

    cores: tuple[int, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def take(self) -> None:
        """From now on the processes that this thread starts have these cores."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)  # of the calling thread, and all that it starts


def equal(count: int) -> list[Share]:
    """`count` equal shares of the GPUs that are there, else of the cores. Raises Refusal where they cannot be shared
    so."""
    if count < 1:
        raise Refusal(f"--at_once={count}: must be at least 1, the arms that are trained side by side")
    if count == 1:
        return [Share()]
    if gpus := _gpus():
        return [Share(environment=(("CUDA_VISIBLE_DEVICES", ",".join(some)),)) for some in _cut(gpus, count, "GPUs")]
    if not hasattr(os, "sched_getaffinity"):
        raise Refusal(f"--at_once={count}: this system does not let a process have cores of its own: leave it out")
    worth = str(max(1, machine.cores() // count))  # where a container's quota is less than its cores
    cut = _cut(sorted(os.sched_getaffinity(0)), count, "cores")
    return [Share(tuple(some), (("NPROC", worth),)) for some in cut]


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; none where JAX is told to use others."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu", "rocm"} & set(platforms.split(",")):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        named = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return [each for each in named if each and not each.startswith("-")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU"))]


def _cut(things: list, count: int, what: str) -> list[list]:
    if len(things) % count:
        raise Refusal(f"--at_once={count}: there are {len(things)} {what}, which are not shared evenly by {count}")
    size = len(things) // count
    return [things[start : start + size] for start in range(0, len(things), size)]
