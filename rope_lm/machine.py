"""What of this machine the process may use, also where a container gives it less than there is."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # control groups of Linux, and this process's


def cores() -> int:
    """How many it may use: those that it may run on, or as many as its quota of time is worth, rounded up, or as NPROC
    says, which XLA obeys too; whichever are fewest."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [*_limits("cpu", "cpu.max"), *_limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    said = [int(os.environ["NPROC"])] if os.environ.get("NPROC", "").isdecimal() else []
    return max(1, min([there, *said, *(math.ceil(quota / period) for quota, period in quotas)]))


def memory() -> int:
    """Bytes of memory that it may use: all that is there, or its limit, if that is less."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_limits("memory", "memory.max"), *_limits("memory", "memory.limit_in_bytes")]
    return min([there, *(bound for bound, *_ in limits)])


def _limits(controller: str, *files: str) -> Iterator[list[int]]:
    """The numbers in these files of each group that holds this process and has such a limit."""
    for folder in _holding(controller):
        try:
            numbers = [int(word) for file in files for word in (folder / file).read_text().split()]
        except (OSError, ValueError):  # not there in this version, or not in this group; "max", which is no limit
            continue
        if numbers and min(numbers) > 0:  # -1 is no limit
            yield numbers


def _holding(controller: str) -> Iterator[Path]:
    """The groups that hold this process, from its own up: of the one tree of version 2, and of the controller's own of
    version 1. A container sees its own group as the root, whatever its path is called outside."""
    for line in MINE.read_text().splitlines() if MINE.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controller if controllers else GROUPS
        own = root / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))
