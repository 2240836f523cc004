"""Equal shares of this machine, for processes that run side by side."""

import os
import subprocess
from typing import Any, NamedTuple

from rope_lm import machine
from rope_lm.refusal import Refusal


class Share(NamedTuple):
    """The GPUs or cores that a process may use; by default the whole machine."""

    cores: tuple[int, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def take(self) -> None:
        """Restrict the calling thread, and every process it starts from now on, to these cores."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)


def equal(count: int) -> list[Share]:
    """Return `count` equal shares of the GPUs or, without GPUs, of the cores.

    Raises Refusal if they cannot be divided equally.
    """
    if count < 1:
        raise Refusal(f"--at_once={count}: must be at least 1, the arms that are trained side by side")
    if count == 1:
        return [Share()]
    if gpus := _gpus():
        parts = _cut(gpus, count, "GPUs")
        return [Share(environment=(("CUDA_VISIBLE_DEVICES", ",".join(part)),)) for part in parts]
    if not hasattr(os, "sched_getaffinity"):
        raise Refusal(f"--at_once={count}: this system does not let a process have cores of its own: leave it out")
    threads = str(max(1, machine.cores() // count))  # a container's quota may be less than its cores
    parts = _cut(sorted(os.sched_getaffinity(0)), count, "cores")
    return [Share(tuple(part), (("NPROC", threads),)) for part in parts]


def _gpus() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them; none if JAX is told to use another platform."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu", "rocm"} & set(platforms.split(",")):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return [name for name in names if name and not name.startswith("-")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU"))]


def _cut(things: list[Any], count: int, name: str) -> list[list[Any]]:
    if len(things) % count:
        raise Refusal(f"--at_once={count}: there are {len(things)} {name}, which are not shared evenly by {count}")
    size = len(things) // count
    return [things[start : start + size] for start in range(0, len(things), size)]
