"""Arms in processes of their own: a script stands for scripts.train, and does what the name of its arm says."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from rope_lm import machine, run_directory
from rope_lm.signals import STOPPED
from rope_lm.sweep.main import sweep
from rope_lm.sweep.pool import Local

TRAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
if "time" in flags:
    print(0.25)
    sys.exit()
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
name = workdir.name

def say(status, step):
    content = {"status": status, "why": "", "step": step, "cores": sorted(os.sched_getaffinity(0))}
    (workdir / "status.json").write_text(json.dumps(content))

def stop(*_):
    say("stopped", 3)
    sys.exit(75)

with open(workdir.parent / "began.txt", "a") as file:
    file.write(name + " ")
if name == "early":  # a signal comes while Python starts, and no handler is set yet
    os.kill(os.getpid(), getattr(signal, os.environ["EARLY"]))
if name == "refused":
    sys.exit(2)
say("running", 0)
print(name, "trains", file=sys.stderr)
if name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "diverges":
    say("diverged", 4)
    sys.exit(4)
if name == "long":
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, stop)
    (workdir / "ready").touch()
    time.sleep(60)
say("finished", 8)
"""
CONFIG: dict = {"steps": 8, "data": {}, "model": {}, "mesh": {}, "optimizer": {"learning_rate": [1.0]}, "seeds": [0]}
CONFIG["optimizer"]["accumulation_steps"] = 1


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A sweep of arms with these names in tmp_path/s; returns its exit status."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(Local, "command", (sys.executable, str(tmp_path / "train.py")))

    def run(*names: str, at_once: int = 1) -> int:
        root = tmp_path / "s"
        return sweep(dict.fromkeys(names, CONFIG), {"a": {"threshold": 1.0}}, root, Local(root, at_once, []))

    return run


def status(root: Path, arm: str) -> str:
    return json.loads((root / "s" / arm / "status.json").read_text())["status"]


def began(root: Path) -> list[str]:
    return (root / "s" / "began.txt").read_text().split()


def test_all_arms_are_trained_after_a_step_of_each_setting_was_measured(run, tmp_path, capfd):
    assert run("s/a", "s/b", "t/a") == 0
    said = capfd.readouterr().err
    before, _, after = said.partition("[1/3]")
    assert "3 arms, about 6 s of training left, by a step of each setting" in before and "0.25" in before
    assert "[2/3] s/b, about 4 s left" in after
    about = run_directory.read_json(tmp_path / "s" / "sweep.json")
    assert {name: row["seconds"] for name, row in about["seconds_per_step"].items()} == {"s": 0.25, "t": 0.25}
    assert about["claims"]["a"]["since"] and (tmp_path / "s" / "plan" / "t" / "a.json").exists()
    assert run("s/a", "s/b", "t/a") == 0
    assert "3 arms, about 0 s of training left" in capfd.readouterr().err
    assert run_directory.read_json(tmp_path / "s" / "sweep.json")["claims"] == about["claims"]


def test_an_arm_that_fails_does_not_stop_the_others(run, tmp_path, capfd):
    assert run("killed", "refused", "diverges", "good") == 1
    said = capfd.readouterr().err
    assert began(tmp_path) == ["killed"] * 3 + ["refused", "diverges", "good"] and said.count("killed: killed") == 3
    assert [status(tmp_path, arm) for arm in ("killed", "diverges", "good")] == ["failed", "diverged", "finished"]
    why = run_directory.read_json(tmp_path / "s" / "killed" / "status.json")["why"]
    assert "killed by SIGKILL" in why and "data.batch" in why
    assert "refused" in said and "see above" in said


@pytest.mark.parametrize("at_once, name", [(1, "SIGTERM"), (2, "SIGTERM"), (1, "SIGHUP"), (1, "SIGUSR1")])
def test_a_signal_stops_all_that_train_and_begins_no_other(run, tmp_path, at_once, name, capfd):
    if machine.cores() < at_once:
        pytest.skip("cores cannot be shared here")
    names = ["long", "more/long"][:at_once]

    def stop() -> None:
        deadline = time.monotonic() + 30
        while not all((tmp_path / "s" / name / "ready").exists() for name in names) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[name])

    thread = threading.Thread(target=stop)
    thread.start()
    assert run(*names, "good", at_once=at_once) == STOPPED
    thread.join()
    assert {status(tmp_path, name) for name in names} == {"stopped"} and not (tmp_path / "s" / "good").exists()
    assert "run the same command again to go on" in capfd.readouterr().err


def test_a_sweep_that_is_stopped_while_it_measures_a_step_lists_its_arms(run, monkeypatch, capfd):
    def stopped(self: Local, arm: str) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Local, "measure", stopped)
    assert run("a", "b") == STOPPED
    said = capfd.readouterr().err
    assert said.count("not run") == 2 and "run the same command again to go on" in said


@pytest.mark.skipif(machine.cores() < 2, reason="cores cannot be shared here")
def test_arms_side_by_side_have_cores_of_their_own(run, tmp_path, capfd):
    assert run("a", "b", "c", at_once=2) == 0
    said = capfd.readouterr().err
    assert "2 arms at once" in said and "[1/3] a trains" in said
    cores = {tuple(run_directory.read_json(tmp_path / "s" / arm / "status.json")["cores"]) for arm in "abc"}
    assert len(cores) == 2 and not set.intersection(*map(set, cores))


@pytest.mark.parametrize(
    "name, said, code",
    [
        ("SIGTERM", "finished", 75),
        ("SIGINT", "running", 75),
        ("SIGHUP", "finished", 75),
        ("SIGABRT", "finished", 1),
        ("SIGABRT", "running", 1),
    ],
)
def test_an_arm_that_a_signal_ends_before_it_began_keeps_its_status(run, tmp_path, monkeypatch, name, said, code):
    monkeypatch.setenv("EARLY", name)
    (tmp_path / "s" / "early").mkdir(parents=True)
    before = {"status": said, "why": "", "step": 8}
    (tmp_path / "s" / "early" / "status.json").write_text(json.dumps(before))
    assert run("early") == code
    found = run_directory.read_json(tmp_path / "s" / "early" / "status.json")
    if name == "SIGABRT" and said == "running":
        assert found["status"] == "failed" and "killed by SIGABRT" in found["why"]
    else:
        assert found == before


def test_an_arm_that_another_process_trains_is_waited_for(run, tmp_path, capfd):
    directory = run_directory.RunDirectory(tmp_path / "s" / "good", {}, {})

    def finish() -> None:
        while "waiting" not in capfd.readouterr().err:
            time.sleep(0.01)
        assert began(tmp_path) == ["other"]
        directory.lock.close()

    thread = threading.Thread(target=finish)
    thread.start()
    assert run("other", "good") == 0
    thread.join()
    assert began(tmp_path) == ["other", "good"]
