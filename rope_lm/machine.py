"""What of this machine the process may use, also where a container gives it less than there is."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # control groups of Linux, and this process's


def cores() -> int:
    """Those that it may run on, or as many as the time that it is given is worth, if those are fewer."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [*_limits("cpu", "cpu.max"), *_limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    return min([there, *(math.ceil(quota / period) for quota, period in quotas)])


def memory() -> int:
    """In bytes."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_limits("memory", "memory.max"), *_limits("memory", "memory.limit_in_bytes")]
    return min([there, *(bound for (bound,) in limits)])


def _limits(controller: str, *files: str) -> Iterator[list[int]]:
    """The numbers in these files of each group that holds this process and has such a limit."""
    for folder in _holding(controller):
        try:
            words = " ".join((folder / file).read_text() for file in files).split()
        except OSError:  # not there in this version, or not in this group
            continue
        if words[0] not in ("max", "-1"):
            yield [int(word) for word in words]


def _holding(controller: str) -> Iterator[Path]:
    """The groups that hold this process, from its own up: of the one tree of version 2, and of the controller's own of
    version 1. A container sees its own group as the root, whatever its path is called outside."""
    for line in MINE.read_text().splitlines() if MINE.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controllers
        own = root / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))
