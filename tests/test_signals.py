"""Signals that ask a run to stop: it saves, whichever came."""

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rope_lm import loop, signals
from rope_lm.run_directory import read_json
from tests.commands import ROOT
from tests.runs import small

STOP = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


@pytest.fixture
def handlers() -> Iterator[None]:
    """Set the handlers back that a test has set."""
    before = {number: signal.getsignal(number) for number in signals.STOP}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stop_at(step: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrange that this process gets a signal once, when a run has computed so many steps."""
    log, sent = loop.Loop._log, []

    def logged(self: loop.Loop) -> None:
        if self.done == step and not sent:
            sent.append(name)
            os.kill(os.getpid(), signal.Signals[name])
        log(self)

    monkeypatch.setattr(loop.Loop, "_log", logged)


@pytest.mark.parametrize("name", STOP)
def test_a_run_that_is_asked_to_stop_saves_and_says_why(name, text, cache, tmp_path, monkeypatch):
    before = signal.getsignal(signal.Signals[name])
    stop_at(2, name, monkeypatch)
    status = loop.train(small(text, cache), tmp_path, {})
    assert status["status"] == "stopped" and status["why"].startswith(f"{name}: run the same command")
    assert read_json(tmp_path / "status.json")["saved"] == status["step"] == 3
    assert signal.getsignal(signal.Signals[name]) == before


def test_under_nohup_a_run_goes_on(handlers, text, cache, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_at(2, "SIGHUP", monkeypatch)
    assert loop.train(small(text, cache), tmp_path, {})["status"] == "finished"


@pytest.mark.parametrize("trains, name, status", [
    (True, "SIGHUP", 75), (True, "SIGUSR1", 75), (True, "SIGTERM", 75), (False, "SIGHUP", -signal.SIGHUP),
])  # fmt: skip
def test_before_there_is_something_to_save_a_process_only_ends(trains, name, status):
    program = (
        f"import os, signal; from scripts import entry; entry.end(lambda: os.kill(0, signal.{name}), trains={trains})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, start_new_session=True
    )
    assert done.returncode == status and "Traceback" not in done.stderr
    assert done.stderr == ("error: stopped\n" if trains else "")


@pytest.mark.parametrize("script", ["train", "sweep"])
def test_help_names_the_signals(script):
    said = ast.get_docstring(ast.parse((ROOT / "scripts" / f"{script}.py").read_text()))
    assert all(name in said for name in {*STOP} - {"SIGINT"}) and "Ctrl-C" in said and "nohup" in said
