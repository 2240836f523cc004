"""What a container gives a process: the files of control groups, laid out as in containers and on hosts."""

import os

import pytest

from rope_lm import machine

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ONE = {"cpu.max": "100000 100000\n"}


@pytest.mark.parametrize(
    "mine, files, cores",
    [
        ("0::/", {}, CORES),  # not in a container: the root has no limits
        ("0::/", {"cpu.max": "max 100000\n"}, CORES),
        ("0::/", ONE, 1),
        ("0::/", {"cpu.max": "20000 100000\n"}, 1),  # rounded up
        ("0::/", {"cpu.max": "6400000 100000\n"}, min(64, CORES)),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "90000 100000\n"}, 1),  # a group above decides
        ("0::/a", {"b/cpu.max": "100000 100000\n"}, CORES),  # of others
        ("0::/../../away", ONE, 1),
        ("2:cpuacct,cpu:/docker/1", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 1),
        ("0::/", {"cpu.max": ""}, CORES),
        ("0::/", {"cpu.max": "0 100000\n"}, CORES),
        ("2:cpu:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, CORES),
        ("3:cpuset:/\n2:cpuacct:/", {"cpuset/cpu.cfs_quota_us": "1\n", "cpuset/cpu.cfs_period_us": "1\n"}, CORES),
    ],
)  # fmt: skip
def test_cores_are_those_that_time_is_given_for(mine, files, cores, tmp_path, monkeypatch):
    lay_out(mine, files, tmp_path, monkeypatch)
    assert machine.cores() == cores


@pytest.mark.parametrize(
    "mine, files, limit",
    [
        ("0::/", {"memory.max": "1000000\n"}, 1_000_000),
        ("0::/a", {"memory.max": "max\n", "a/memory.max": "3000\n"}, 3000),
        ("4:memory:/x\n0::/", {"memory/x/memory.limit_in_bytes": "2000\n"}, 2000),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),  # none, in version 1
        ("0::/", {}, None),
        ("0::/", {"memory.max": "0\n"}, None),
    ],
)
def test_memory_is_what_a_container_has(mine, files, limit, tmp_path, monkeypatch):
    lay_out(mine, files, tmp_path, monkeypatch)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.memory() == (limit or whole)


@pytest.mark.parametrize("said, cores", [("1", 1), ("1000", CORES), ("0", 1), ("many", CORES), ("", CORES)])
def test_what_xla_is_told_bounds_the_cores(said, cores, monkeypatch):
    monkeypatch.setenv("NPROC", said)
    assert machine.cores() == cores


def test_a_system_without_control_groups_has_all_that_is_there(tmp_path, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(machine, "MINE", tmp_path / "none")
    assert machine.cores() == CORES


def lay_out(mine, files, folder, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    groups = folder / "cgroup"
    for name, text in files.items():
        path = groups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "mine").write_text(mine + "\n")
    monkeypatch.setattr(machine, "GROUPS", groups)
    monkeypatch.setattr(machine, "MINE", folder / "mine")
