"""The machine in equal shares."""

import os

import pytest

from rope_lm import machine
from rope_lm.refusal import Refusal
from rope_lm.sweep import shares
from rope_lm.sweep.shares import Share

needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or machine.cores() < 2, reason="cores cannot be shared here"
)


def test_one_share_is_the_whole_machine():
    assert shares.equal(1) == [Share()]


@pytest.mark.parametrize("platforms", ["", "cuda,cpu"])
def test_gpus_are_shared_before_cores(monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5,GPU-7")
    assert [dict(share.environment) for share in shares.equal(2)] == [
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
    assert [share.cores for share in shares.equal(2)] == [(2, 4), (5, 7)]
    monkeypatch.setattr(machine, "cores", lambda: 3)  # as a quota may say
    assert [dict(share.environment) for share in shares.equal(2)] == [{"NPROC": "1"}] * 2
    with pytest.raises(Refusal, match="--at_once=8: there are 4 cores"):
        shares.equal(8)


def test_none_at_once_is_refused():
    with pytest.raises(Refusal, match="--at_once=0: must be at least 1"):
        shares.equal(0)
