"""The machine in equal shares, and a sweep that trains an arm on each."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from rope_lm import journal, machine, shares
from rope_lm.refusal import Refusal
from rope_lm.shares import Share
from tests.test_faults import until
from tests.test_scripts import ROOT, SMALL

needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or machine.cores() < 2, reason="cores cannot be shared here"
)


def test_one_share_is_the_whole_machine():
    assert shares.equal(1) == [Share()]


@pytest.mark.parametrize("platforms", ["", "cuda,cpu"])
def test_gpus_are_shared_before_cores(monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5,GPU-7")
    assert [dict(each.environment) for each in shares.equal(2)] == [
        {"CUDA_VISIBLE_DEVICES": "0,3"},
        {"CUDA_VISIBLE_DEVICES": "5,GPU-7"},
    ]
    with pytest.raises(Refusal, match="--at_once=3: there are 4 GPUs, which are not shared evenly by 3"):
        shares.equal(3)


@needs_two_cores
@pytest.mark.parametrize("visible, platforms", [("", ""), ("-1", ""), ("0,1", "cpu")])
def test_cores_are_shared_where_there_is_no_gpu(monkeypatch, visible, platforms):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 2, 4, 5})
    assert [each.cores for each in shares.equal(2)] == [(2, 4), (5, 7)]
    monkeypatch.setattr(machine, "cores", lambda: 3)  # as a quota may say
    assert [dict(each.environment) for each in shares.equal(2)] == [{"NPROC": "1"}] * 2
    with pytest.raises(Refusal, match="--at_once=8: there are 4 cores"):
        shares.equal(8)


def test_none_at_once_is_refused():
    with pytest.raises(Refusal, match="--at_once=0: must be at least 1"):
        shares.equal(0)


def sweep(workdir, text, cache, *flags: str) -> subprocess.Popen:
    words = [f"--workdir={workdir}", "--config=configs/ablation.py:quick", "--only=none,learned,rotary", "--at_once=2"]
    data = [f"--config.base.data.name=text:{text}", f"--config.base.data.cache={cache}"]
    command = [sys.executable, "-m", "scripts.sweep", *words, *SMALL, *data, *flags]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@needs_two_cores
def test_arms_train_side_by_side_each_on_cores_of_its_own(text, cache, tmp_path):
    child = sweep(tmp_path, text, cache, "--config.base.steps=300", "--config.base.every.save=300")
    together = lambda: all(journal.holder(tmp_path / arm) for arm in ("none", "learned"))  # noqa: E731
    until(together)
    said = child.communicate(timeout=300)[1]
    assert child.returncode == 0, said
    assert "2 arms at once" in said and re.search(r"^\[\d/3\] none: step", said, re.M), said
    for arm in ("none", "learned", "rotary"):
        assert json.loads((tmp_path / arm / "status.json").read_text())["status"] == "finished"
        half = machine.cores() // 2
        assert json.loads((tmp_path / arm / "manifest.json").read_text())["device"]["count"] == half


@needs_two_cores
def test_a_signal_stops_all_that_train_and_begins_no_other(text, cache, tmp_path):
    child = sweep(tmp_path, text, cache, "--config.base.steps=100000", "--config.base.every.save=100000")
    status = lambda arm: (journal.read_json(tmp_path / arm / "status.json") or {}).get("status")  # noqa: E731
    until(lambda: status("none") == status("learned") == "running")
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=120)[1]
    assert child.returncode == 75, said
    assert status("none") == status("learned") == "stopped" and status("rotary") is None
    assert "run the same command again to go on" in said
