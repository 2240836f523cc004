"""The cores and the memory of this machine that the process may use, inside a container or not."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux control groups; those of this process


def cores() -> int:
    """Return how many cores the process may use.

    It is the smallest of the cores that the process may run on, its quota of CPU time rounded up, and NPROC, which XLA
    obeys too.
    """
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [*_limits("cpu", "cpu.max"), *_limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    nproc = [int(os.environ["NPROC"])] if os.environ.get("NPROC", "").isdecimal() else []
    return max(1, min([present, *nproc, *(math.ceil(quota / period) for quota, period in quotas)]))


def memory() -> int:
    """Return the bytes of memory that the process may use: the machine's, or its limit if that is lower."""
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_limits("memory", "memory.max"), *_limits("memory", "memory.limit_in_bytes")]
    return min([present, *(limit for limit, *_ in limits)])


def _limits(controller: str, *files: str) -> Iterator[list[int]]:
    """Yield the numbers in these files, for each control group of this process that sets such a limit."""
    for folder in _groups(controller):
        try:
            numbers = [int(word) for file in files for word in (folder / file).read_text().split()]
        except (OSError, ValueError):  # not in this version or group; "max", which is no limit
            continue
        if numbers and min(numbers) > 0:  # -1 is no limit
            yield numbers


def _groups(controller: str) -> Iterator[Path]:
    """Yield the control groups of this process, from its own upwards: version 2's tree, and version 1's per controller.

    A container sees its own group as the root, whatever the path of that group is outside.
    """
    for line in MINE.read_text(errors="replace").splitlines() if MINE.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controller if controllers else GROUPS
        own = root / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))
