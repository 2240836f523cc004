"""Faults that are injected into real processes, and what has to come of each.

The numbers are the rows of the table in docs/faults.md.
"""

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rope_lm import data, distance, interop, machine, run_directory
from rope_lm.analysis import load
from rope_lm.checkpoint import damage
from rope_lm.data import tokenizer
from rope_lm.refusal import Refusal
from rope_lm.verification import verify
from tests.commands import ROOT, Fork, call, fork

STOPPED = 75
SMALL = {
    "steps": 12, "seeds": "0,1", "every.evaluate": 4, "every.log": 2, "every.save": 4, "data.length": 16,
    "data.batch": 4, "data.validation_rows": 4, "model.width": 16, "model.heads": 2, "model.layers": 1,
    "model.hidden": 32,
}  # fmt: skip


class Runs:
    """Runs of one small config, each in a process of its own."""

    def __init__(self, text: Path, cache: str):
        self.text, self.cache = text, cache

    def command(self, workdir: Path, *faults: str, **changes: object) -> list[str]:
        """The words after `python -m`; keys of the config are written model__width."""
        settings = SMALL | {"data.cache": self.cache} | {key.replace("__", "."): changes[key] for key in changes}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        config = f"--config=configs/lm.py:position=rotary,data=text:{self.text}"
        script = ["tests.faulty", *faults, "--"] if faults else ["scripts.train"]
        return [*script, f"--workdir={workdir}", config, *flags]

    def start(self, workdir: Path, *faults: str, env: dict | None = None, **changes: object) -> Fork:
        return Fork(*self.command(workdir, *faults, **changes), env=env)

    def run(self, workdir: Path, *faults: str, status: int = 0, env: dict | None = None, **changes: object) -> str:
        """Run to the end, which must have this exit status; return what was said on stderr."""
        child = self.start(workdir, *faults, env=env, **changes)
        error = child.communicate()[1]
        assert child.returncode == status, f"{child.returncode} instead of {status}\n{error[-3000:]}"
        return error


@pytest.fixture(scope="module")
def runs(text: Path, cache: str) -> Runs:
    return Runs(text, cache)


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    runs.run(workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped_once(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("stopped")
    runs.run(workdir, "step:10:SIGTERM", status=STOPPED)
    return workdir


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of a run that SIGTERM stopped at step 10 of 12: it has the checkpoints of steps 8 and 10."""
    assert read(stopped_once, "status")["step"] == 10
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


@pytest.fixture
def disk() -> Iterator:
    """A function that makes a real file system of a given size, in its own mount namespace, and returns its folder."""
    holders = []

    def make(size: str) -> Path:
        mount = f"mount -t tmpfs -o size={size} disk /mnt && echo mounted && exec sleep 600"
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        holders.append(holder)
        if holder.stdout.readline() != b"mounted\n":
            pytest.skip(f"no file system can be mounted here: {holder.stderr.read().decode().strip()}")
        return Path(f"/proc/{holder.pid}/root/mnt")

    if not shutil.which("unshare"):
        pytest.skip("a small disk is made with unshare, of Linux")
    yield make
    for holder in holders:
        holder.kill()
        holder.communicate()


def state(workdir: Path) -> tuple[int, list[np.ndarray]]:
    """The newest checkpoint: its step, and every array in it."""
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda folder: int(folder.name))
    assert damage(newest) is None
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # the run may have had more
    with ocp.StandardCheckpointer() as orbax:
        saved = orbax.metadata(newest / "state").item_metadata
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
        return int(newest.name), [np.asarray(leaf) for leaf in jax.tree.leaves(orbax.restore(newest / "state", target))]


def metrics(workdir: Path) -> dict:
    """The last measurement of each (split, member, step): the numbers that do not depend on a clock."""
    keys = ("nats", "gradient_norm", "learning_rate", "tokens")
    rows = run_directory.read_rows(workdir / "metrics.jsonl")
    return {(row["split"], row["member"], row["step"]): [row.get(key) for key in keys] for row in rows}


def read(workdir: Path, name: str) -> dict:
    return json.loads((workdir / f"{name}.json").read_text())


def assert_same(a: Path, b: Path) -> None:
    """Require the same state bit for bit, the same metrics and the same batches."""
    (step, leaves), (other_step, other_leaves) = state(a), state(b)
    assert step == other_step and len(leaves) == len(other_leaves)
    for x, y in zip(leaves, other_leaves, strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()
    assert metrics(a) == metrics(b)
    assert read(a, "manifest")["batches"] == read(b, "manifest")["batches"]
    assert not [finding.text for finding in verify(b) if finding.wrong]


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


# 1. SIGTERM and SIGINT in the middle of a step, during an evaluation, during a save.


@pytest.mark.parametrize(
    "moment, name",
    [("step:6", "SIGTERM")]
    + [
        pytest.param(*fault, marks=pytest.mark.all)
        for fault in [
            ("evaluation:2", "SIGTERM"),
            ("save:1", "SIGTERM"),
            ("step:6", "SIGINT"),
            ("save:1", "SIGINT"),
            ("step:6", "SIGHUP"),
        ]
    ],
)
def test_01_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(runs, whole, tmp_path, moment, name):
    runs.run(tmp_path, f"{moment}:{name}", status=STOPPED)
    status = read(tmp_path, "status")
    assert status["status"] == "stopped" and name in status["why"] and 0 < status["step"] < 12
    runs.run(tmp_path)
    assert [segment["step"] for segment in read(tmp_path, "manifest")["segments"]] == [0, status["step"]]
    assert_same(whole, tmp_path)


@pytest.mark.all
def test_01_a_process_started_by_itself_ends_within_seconds_of_the_signal(runs, tmp_path):
    command = runs.command(tmp_path, steps=10**6, every__save=10**6)
    child = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    until(
        lambda: (tmp_path / "metrics.jsonl").exists() and len(run_directory.read_rows(tmp_path / "metrics.jsonl")) > 10
    )
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == STOPPED and time.monotonic() - began < 30


# 2. SIGKILL at random moments.


@pytest.mark.all
def test_02_thirty_kills_at_random_moments_change_no_bit(runs, tmp_path):
    changes = {"steps": 3000, "every__save": 10, "every__evaluate": 500, "every__log": 100}
    runs.run(tmp_path / "whole", **changes | {"every__save": 1000})
    workdir = tmp_path / "killed"

    def saves() -> set[str]:
        return {folder.name for folder in workdir.glob("checkpoints/[0-9]*")}

    torn, moments = 0, random.Random(0)
    for _ in range(30):
        before = saves()
        child = runs.start(workdir, **changes)
        until(lambda before=before: saves() - before)
        time.sleep(0.2 * moments.random())
        child.send_signal(signal.SIGKILL)
        child.wait()
        torn += any(not (folder / "sha256.json").exists() for folder in workdir.glob("checkpoints/[0-9]*"))
    assert read(workdir, "status")["status"] == "running", "all thirty hit a run at work"
    assert torn > 3, "some hit a save"
    runs.run(workdir, **changes)
    assert_same(tmp_path / "whole", workdir)
    assert {folder.name for folder in (workdir / "checkpoints").iterdir()} == {"2990", "3000"}, "no torn save is left"


def test_02_a_kill_in_the_middle_of_a_save(runs, whole, tmp_path):
    runs.run(tmp_path, "save:2:SIGKILL", status=-signal.SIGKILL)
    assert not (tmp_path / "checkpoints" / "8" / "sha256.json").exists(), "the save was torn"
    assert (tmp_path / "checkpoints" / "8").exists() and (tmp_path / "checkpoints" / "4" / "sha256.json").exists()
    runs.run(tmp_path)
    assert read(tmp_path, "manifest")["segments"][1]["step"] == 4
    left = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert left == {"8", "12"}, "the torn save is no damage: it is gone"
    assert_same(whole, tmp_path)


# 3. A second signal during the save that the first one caused.


@pytest.mark.all
def test_03_a_second_signal_does_not_tear_the_save(runs, whole, tmp_path):
    runs.run(tmp_path, "step:6:SIGTERM", "save:2:SIGTERM", status=STOPPED)
    assert state(tmp_path)[0] == read(tmp_path, "status")["step"] == 6
    runs.run(tmp_path)
    assert_same(whole, tmp_path)


# 4 and 5. Damage to checkpoints (to each of their files: tests/test_checkpoint.py).


def hurt(folder: Path, how: str) -> Path:
    """Damage the largest file of a folder; return its path."""
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "a byte flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "truncated":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    return file


DAMAGE = ["truncated", "deleted"]


@pytest.mark.parametrize("how", ["a byte flipped", *(pytest.param(how, marks=pytest.mark.all) for how in DAMAGE)])
def test_04_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(runs, whole, stopped, how):
    file = hurt(stopped / "checkpoints" / "10", how)
    assert [finding.text for finding in verify(stopped) if finding.wrong and file.name in finding.text]
    said = runs.run(stopped)
    assert "checkpoint step 10: " in said and file.name in said and "bad/10.0" in said
    assert "stood at step 10, goes on from step 8" in said
    assert_same(whole, stopped)  # it has its last checkpoint: later saves were really written


@pytest.mark.all
def test_05_where_no_checkpoint_is_whole_the_run_refuses_and_never_starts_from_zero(runs, stopped):
    before = (stopped / "metrics.jsonl").read_bytes()
    for folder in list((stopped / "checkpoints").iterdir()):
        hurt(folder, "truncated")
    said = runs.run(stopped, status=2)
    assert "is whole (step 10" in said and "; step 8: " in said and "delete the run's folder" in said
    again = runs.run(stopped, status=2)
    assert "is whole (bad/10" in again, "the second time too"
    shutil.rmtree(stopped / "checkpoints")
    assert "its checkpoints are gone" in runs.run(stopped, status=2)
    assert (stopped / "metrics.jsonl").read_bytes() == before


@pytest.mark.all
@pytest.mark.parametrize("fault, step", [("save:1:SIGKILL", 0), ("save:2:SIGKILL", 4)])
def test_05_a_run_that_was_killed_starts_from_zero_only_where_it_never_saved(runs, whole, tmp_path, fault, step):
    runs.run(tmp_path, fault, status=-signal.SIGKILL)
    status = read(tmp_path, "status")
    assert status["status"] == "running" and status["saved"] == step
    shutil.rmtree(tmp_path / "checkpoints")
    if step:
        assert f"saved at step {step} and its checkpoints are gone" in runs.run(tmp_path, status=2)
        (tmp_path / "status.json").write_text(json.dumps(status | {"status": "failed"}))
        assert f"saved at step {step} and its checkpoints are gone" in runs.run(tmp_path, status=2)
    else:
        runs.run(tmp_path)
        assert_same(whole, tmp_path)


# 6. A full disk.


@pytest.mark.all
def test_06_a_disk_that_fills_while_saving(runs, disk):
    small = disk("900k")
    wide = {"seeds": "0", "model__width": 64, "steps": 200, "every__save": 5, "every__log": 5}
    said = runs.run(small / "run", status=1, **wide)
    assert "No space left on device" in said.splitlines()[-1] and "goes on from the last checkpoint" in said
    status = read(small / "run", "status")
    folders = (small / "run" / "checkpoints").glob("[0-9]*")  # the newest may be torn, if its sums found no room
    step = max(int(folder.name) for folder in folders if damage(folder) is None)
    assert status["status"] == "failed" and status["step"] - step <= 2 * 5, "within one interval"
    assert run_directory.read_rows(small / "run" / "metrics.jsonl")[-1]["step"] <= status["step"]


@pytest.mark.all
def test_06_a_disk_that_fills_while_metrics_are_appended(runs, disk):
    small = disk("2m")
    child = runs.start(small / "run", steps=10**6, every__save=10**6, every__log=1)
    until(lambda: (small / "run" / "metrics.jsonl").exists())
    with pytest.raises(OSError), open(small / "fill", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1024)
    error = child.communicate(30)[1]
    assert child.returncode == 1 and "No space left on device" in error.splitlines()[-1], error
    content = (small / "run" / "metrics.jsonl").read_bytes()
    assert content.endswith(b"}\n") and len(run_directory.read_rows(small / "run" / "metrics.jsonl")) > 1


# 7. A folder that cannot be written.


@pytest.mark.all
def test_07_a_read_only_workdir_is_refused_before_compiling(runs, disk):
    folder = disk("1m")
    subprocess.run(
        ["nsenter", f"--target={folder.parts[2]}", "--user", "--mount", "mount", "-o", "remount,ro", "/mnt"], check=True
    )
    done = call(*runs.command(folder / "run"), env={"JAX_LOG_COMPILES": "1"})
    assert done.returncode == 2 and "cannot be written (Read-only file system)" in done.stderr
    assert "Compiling jit(step)" not in done.stderr


# 8. A torn line, steps that are done again.


@pytest.mark.all
def test_08_a_torn_line_is_dropped_and_replayed_steps_count_once(runs, whole, tmp_path):
    runs.run(tmp_path, "step:12:SIGKILL", status=-signal.SIGKILL)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "member": 0, "spl')
    assert [finding.text for finding in verify(tmp_path) if "torn line" in finding.text]
    runs.run(tmp_path)
    assert read(tmp_path, "manifest")["segments"][1]["step"] in (4, 8), "10 was logged and is done again"
    steps = [row["step"] for row in run_directory.read_rows(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert steps.count(10) == 4, "two members, twice"
    curve = load(tmp_path).runs[0].curves[0]
    assert curve.steps.tolist() == [0, 4, 8, 12]
    assert_same(whole, tmp_path)


# 9. Losses that are not finite.


@pytest.mark.all
def test_09_a_member_that_diverges_is_frozen_and_the_others_go_on(runs, tmp_path):
    wild = {"seeds": "0", "optimizer__learning_rate": "3e-3,1e30", "optimizer__gradient_clip": 1e30}
    runs.run(tmp_path / "one", **wild)
    status = read(tmp_path / "one", "status")
    assert status["status"] == "finished" and list(status["diverged"]) == ["1"] and "member 1 at step" in status["why"]
    assert [curve.learning_rate for curve in load(tmp_path / "one").runs[0].curves] == [3e-3]
    assert call("scripts.report", tmp_path / "one", f"--out={tmp_path / 'report'}").returncode == 0
    assert "member 1 at step" in (tmp_path / "report" / "index.html").read_text()
    runs.run(tmp_path / "one", "step:15:SIGKILL", status=-signal.SIGKILL, **wild | {"steps": 18})
    assert read(tmp_path / "one", "status")["diverged"] == status["diverged"], "also of a run that goes on"
    assert not [finding.text for finding in verify(tmp_path / "one") if "lacks the" in finding.text]
    found = distance.measure(tmp_path / "one", 2)
    assert found["seeds"] == [0] and len(found["mass"]) == 1, "a lost member is not measured"
    runs.run(tmp_path / "all", status=4, **wild | {"optimizer__learning_rate": "1e30,2e30"})
    assert read(tmp_path / "all", "status")["status"] == "diverged"
    with pytest.raises(Refusal, match=r"every member of the run in .* diverged"):
        distance.measure(tmp_path / "all", 2)
    assert all(np.isfinite(leaf).all() for leaf in state(tmp_path / "all")[1]), "the last finite state is kept"


# 10. Too little memory.


def sweep_words(runs: Runs, workdir: Path, arms: str, **changes: object) -> list[str]:
    flags = [flag.replace("--config.", "--config.base.") for flag in runs.command(workdir, **changes)[3:]]
    name = f"--config.base.data.name=text:{runs.text}"
    words = [f"--workdir={workdir}", "--config=configs/ablation.py:quick", f"--only={arms}", name, *flags]
    return ["scripts.sweep", *words]


def sweep(runs: Runs, workdir: Path, arms: str, **changes: object) -> Fork:
    """The launcher of a sweep; its arms are processes started anew."""
    return Fork(*sweep_words(runs, workdir, arms, **changes))


def trainer(workdir: Path) -> int | None:
    """The process that trains in a folder."""
    holder = run_directory.holder(workdir)
    return int(holder.split()[1]) if holder and holder.startswith("process") else None


@pytest.mark.all
def test_10_an_arm_that_is_killed_is_tried_three_times_and_said_to_have_failed(runs, tmp_path):
    """SIGKILL is what the kernel sends when the host is out of memory."""
    child = sweep(runs, tmp_path, "rotary", steps=10**6, every__save=100)
    killed: set[int] = set()
    while len(killed) < 3:
        until(lambda: trainer(tmp_path / "rotary") not in (None, *killed))
        pid = trainer(tmp_path / "rotary")
        until(lambda: read(tmp_path / "rotary", "status")["status"] == "running" if killed else True)
        until(lambda: list(tmp_path.glob("rotary/checkpoints/*/sha256.json")))
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    said = child.communicate()[1]
    assert child.returncode == 1 and said.count("rotary: killed") == 3
    status = read(tmp_path / "rotary", "status")
    assert status["status"] == "failed" and "killed by SIGKILL" in status["why"] and "data.batch" in status["why"]


@pytest.mark.all
def test_10_a_device_out_of_memory_says_what_to_lower(runs, tmp_path):
    # On one device: with two, the other one would wait for the device that has failed.
    large = {"model__attention__kernel": "xla", "model__width": 64, "model__heads": 32, "mesh__data": 1}
    large |= {"data__length": 2048, "data__batch": 2, "data__validation_rows": 2}
    said = runs.run(tmp_path, "memory:300", status=1, **large)
    for words in ("out of memory: lower data.batch (2) or data.length (2048)", "fewer than 2 members"):
        assert words in said.splitlines()[-1], said
    assert read(tmp_path, "status")["status"] == "failed"


# 11. Two processes, one workdir.


@pytest.mark.all
def test_11_the_second_process_in_a_workdir_refuses_and_a_dead_ones_lock_is_taken_over(runs, whole, tmp_path):
    first = runs.start(tmp_path, steps=10**6)
    until(lambda: trainer(tmp_path))
    said = runs.run(tmp_path, status=2, steps=10**6)
    assert f"is in use by process {first.pid} on {os.uname().nodename}" in said
    first.send_signal(signal.SIGKILL)
    first.wait()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / ".lock").write_text("process 1 on another-host")  # of another boot, say
    runs.run(tmp_path)
    assert_same(whole, tmp_path)


# 12. Preparing text (also tests/data/test_tokens.py).


@pytest.mark.all
def test_12_two_runs_that_prepare_one_text_at_once_both_succeed(runs, whole, tmp_path):
    children = [runs.start(tmp_path / name, data__cache=tmp_path / "cache") for name in "ab"]
    assert [child.wait() for child in children] == [0, 0]
    for name in "ab":
        assert_same(whole, tmp_path / name)


@pytest.mark.all
@pytest.mark.parametrize("how", ["a byte flipped", "truncated", "deleted"])
def test_12_tokens_that_are_damaged_are_made_again(runs, whole, stopped, how):
    cache = stopped.parent / "cache"
    shutil.copytree(runs.cache, cache)
    files = [hurt(folder, how) for folder in (cache / "tokens").iterdir() if folder.is_dir()]
    said = runs.run(stopped, data__cache=cache)
    assert any(f"{file}: not as it was written; made again" in said for file in files), said
    assert_same(whole, stopped)


# 13. Another config on resume.


@pytest.mark.all
@pytest.mark.parametrize(
    "change, words",
    [
        ({"seeds": "0,2"}, "seeds: [0, 1] -> [0, 2]"),
        ({"data__batch": 8}, "data.batch: 4 -> 8"),
        ({"data__length": 8}, "data.length: 16 -> 8"),
        ({"every__evaluate": 5}, "every.evaluate: 4 -> 5"),
    ],
)
def test_13_another_config_is_refused_with_the_difference(runs, stopped, change, words):
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in stopped.rglob("*.json*")}

    before = content()
    assert words in runs.run(stopped, status=2, **change)
    assert content() == before


@pytest.mark.all
def test_13_another_text_is_refused_with_its_fingerprint(runs, tmp_path):
    mine = Runs(tmp_path / "mine.txt", runs.cache)
    shutil.copy(runs.text, mine.text)
    mine.run(tmp_path / "run", "step:2:SIGTERM", status=STOPPED)
    mine.text.write_text(mine.text.read_text().replace("line 7 ", "line x "))
    assert "fingerprint of text: " in mine.run(tmp_path / "run", status=2)
    assert [finding.text for finding in verify(tmp_path / "run") if "the text here is another" in finding.text]


@pytest.mark.all
def test_13_the_cadence_of_logging_and_saving_may_change(runs, whole, stopped):
    runs.run(stopped, every__log=3, every__save=7)
    assert state(stopped)[0] == 12 and not [finding.text for finding in verify(stopped) if finding.wrong]
    shared = metrics(whole).keys() & metrics(stopped).keys()
    assert len(shared) == 20 and all(metrics(whole)[key] == metrics(stopped)[key] for key in shared)
    assert read(stopped, "manifest")["segments"][1]["changed"] == {"every.log": [2, 3], "every.save": [4, 7]}


# 14. Another number of devices on resume.


@pytest.mark.all
def test_14_devices_1_then_4_then_2(runs, whole, tmp_path):
    for count, faults, status in ((1, ["step:3:SIGTERM"], STOPPED), (4, ["step:7:SIGTERM"], STOPPED), (2, [], 0)):
        runs.run(tmp_path, *faults, status=status, env={"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"})
    assert [segment["device"]["count"] for segment in read(tmp_path, "manifest")["segments"]] == [1, 4, 2]
    a, b = metrics(whole), metrics(tmp_path)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key][0] == pytest.approx(b[key][0], abs=1e-5), key
    assert read(whole, "manifest")["batches"] == read(tmp_path, "manifest")["batches"]


# 15. Another version of a package on resume.


@pytest.mark.all
def test_15_another_version_is_a_warning_and_a_segment(runs, whole, stopped):
    manifest = read(stopped, "manifest")
    manifest["segments"][0]["versions"]["jax"] = manifest["versions"]["jax"] = "0.0.1"
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    assert [finding.text for finding in verify(stopped) if finding.text.startswith("jax was 0.0.1, here it is ")]
    assert "versions.jax changed from 0.0.1 to " in runs.run(stopped)
    versions = [segment["versions"]["jax"] for segment in read(stopped, "manifest")["segments"]]
    assert versions == ["0.0.1", jax.__version__]
    assert_same(whole, stopped)


# 16. The clock moved back.


@pytest.mark.all
def test_16_the_clock_is_a_day_behind_on_resume(runs, whole, stopped):
    runs.run(stopped, "clock:-86400")
    rows = [row for row in run_directory.read_rows(stopped / "metrics.jsonl") if row["split"] == "train"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    events = EventAccumulator(str(stopped / "tensorboard" / "member_0")).Reload()
    assert [event.step for event in events.Scalars("train/nats")] == list(range(2, 13, 2))
    assert_same(whole, stopped)


# 17. Text of every kind (one line of 60 MB, datasets, a missing download: tests/data/test_corpora.py).


def zipped(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)


def flipped(path: Path, name: str, content: bytes) -> None:
    """A zip whose member is no deflated stream any more."""
    zipped(path, name, content)
    whole = bytearray(path.read_bytes())
    start = 30 + len(name)  # of the stream, after the member's header
    whole[start : start + 8] = b"\xff" * 8
    path.write_bytes(whole)


LINES = b"a line of text\n" * 200
ODD = b"bytes \xff\xfe are no UTF-8 but they are tokens\n" * 100
TEXTS = {
    "missing": (lambda path: None, "no such file or folder"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "empty folder": (lambda path: path.mkdir(), "the folder holds no .txt, .md, .py file"),
    "binary": (lambda path: path.write_bytes(b"\x7fELF\0\0\0" * 99), "is binary"),
    "binary at its end": (lambda path: path.write_bytes(LINES * 50 + b"\0"), "is binary"),
    "utf-16": (lambda path: path.write_bytes(LINES.decode().encode("utf-16")), "is UTF-16; convert it to UTF-8"),
    "utf-32": (lambda path: path.write_bytes(LINES.decode().encode("utf-32")), "is UTF-32; convert it to UTF-8"),
    "too short": (
        lambda path: path.write_bytes(b"short"),
        "the training text has 0 rows of 16 tokens, a batch needs 2",
    ),
    "few rows": (lambda path: path.write_bytes(b"x" * 300), "data.validation_rows asks for 2"),
    "symlink loop": (lambda path: path.symlink_to(path), "cannot be read"),
    "torn.zip": (lambda path: path.write_bytes(b"PK\3\4 torn"), "cannot be read"),
    "flipped.zip": (lambda path: flipped(path, "a.txt", LINES), "cannot be read"),
    "out.zip": (lambda path: zipped(path, "../out.txt", LINES), "'../out.txt' leads out of the zip"),
    "absolute.zip": (lambda path: zipped(path, "/etc/out.txt", LINES), "'/etc/out.txt' leads out of the zip"),
    "bomb.zip": (lambda path: zipped(path, "bomb.txt", b"0" * 2**25), "more than text does"),
}


def make(path: Path, cache: str) -> data.Data:
    return data.make(f"text:{path}", "bytes", 16, 2, 2, cache, "", "")


@pytest.mark.parametrize("kind", TEXTS)
def test_17_text_that_is_none_is_one_line_and_nothing_is_written(tmp_path, cache, kind):
    write, words = TEXTS[kind]
    path = tmp_path / (kind if "." in kind else f"{kind}.txt")
    write(path)
    with pytest.raises(Refusal, match=words) as refusal:
        make(path, cache)
    assert "\n" not in str(refusal.value)
    assert not [*tmp_path.parent.glob("out.txt"), *Path("/etc").glob("out.txt")], "outside of the cache"


def test_17_a_file_that_may_not_be_read_is_one_line(cache):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mine.txt")
        path.write_bytes(LINES)
        path.chmod(0)
        os.chmod(folder, 0o755)
        mine = os.geteuid()
        if mine == 0:  # root reads every file
            os.seteuid(65534)
        try:
            with pytest.raises(Refusal, match=r"cannot be read .*Permission denied.*give a readable file"):
                make(path, cache)
        finally:
            os.seteuid(mine)


def test_17_names_with_newlines_loops_among_files_and_bytes_that_are_no_utf8(tmp_path, cache):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a\nb.txt").write_bytes(LINES)
    (tmp_path / "t" / "again").symlink_to(tmp_path / "t")
    (tmp_path / "t" / ".#a.txt").symlink_to("someone@machine.4711")  # as Emacs does for a file that is being edited
    with open(os.fsencode(tmp_path / "t") + b"/\xff.txt", "wb") as file:
        file.write(ODD)
    made = make(tmp_path / "t", cache)
    assert sum(made.tokens.values()) == len(LINES) + len(ODD) + sum(made.documents.values())


# 18. The launcher of a sweep is killed.


@contextmanager
def paused(workdir: Path) -> Iterator[None]:
    """Halt the process that trains in a folder, as soon as there is one, for as long as the context lasts."""
    until(lambda: trainer(workdir))
    pid = trainer(workdir)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def files(workdir: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in workdir.rglob("*.json*")}


@pytest.mark.all
def test_18_a_sweep_that_is_killed_goes_on_with_what_is_missing(runs, tmp_path):
    first = sweep(runs, tmp_path, "none,rotary")
    with paused(tmp_path / "rotary"):
        first.send_signal(signal.SIGKILL)
        first.wait()
        before = files(tmp_path / "none")
        second = sweep(runs, tmp_path, "none,rotary")
        until(lambda: "rotary: waiting for process" in second.read()[1])
    assert second.wait() == 0, second.read()
    assert before == files(tmp_path / "none")
    assert len(read(tmp_path / "rotary", "manifest")["segments"]) == 1, "the arm went on by itself"
    for arm in ("none", "rotary"):
        assert not [finding.text for finding in verify(tmp_path / arm) if finding.wrong]


@pytest.mark.all
def test_18_a_sweep_that_is_stopped_while_it_waits_leaves_the_other_alone(runs, tmp_path):
    first = sweep(runs, tmp_path, "rotary", steps=10**6, every__save=10**6)
    until(lambda: trainer(tmp_path / "rotary") and (tmp_path / "rotary" / "metrics.jsonl").exists())
    first.send_signal(signal.SIGKILL)
    first.wait()
    pid = trainer(tmp_path / "rotary")
    second = sweep(runs, tmp_path, "rotary", steps=10**6, every__save=10**6)
    until(lambda: "waiting for process" in second.read()[1])
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == STOPPED
    assert trainer(tmp_path / "rotary") == pid and read(tmp_path / "rotary", "status")["status"] == "running"
    os.kill(pid, signal.SIGTERM)
    until(lambda: trainer(tmp_path / "rotary") is None)


@pytest.mark.all
@pytest.mark.skipif(machine.cores() < 2, reason="arms side by side take two cores")
def test_18_arms_side_by_side_train_on_though_what_they_say_has_nowhere_to_go(runs, tmp_path):
    command = [sys.executable, "-m", *sweep_words(runs, tmp_path, "none,rotary"), "--at_once=2"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    until(lambda: trainer(tmp_path / "none") and trainer(tmp_path / "rotary"))
    first.kill()
    first.communicate()
    until(lambda: not (trainer(tmp_path / "none") or trainer(tmp_path / "rotary")))
    assert [read(tmp_path / arm, "status")["status"] for arm in ("none", "rotary")] == ["finished"] * 2


@pytest.mark.all
def test_18_of_two_sweeps_that_come_to_an_arm_at_once_one_waits(runs, tmp_path):
    both = [sweep(runs, tmp_path, "rotary") for _ in range(2)]
    with paused(tmp_path / "rotary"):
        until(lambda: any("waiting for process" in child.read()[1] for child in both))
    assert [child.wait() for child in both] == [0, 0], [child.read() for child in both]
    assert len(read(tmp_path / "rotary", "manifest")["segments"]) == 1


# 19. A run on another machine.


@pytest.mark.all
def test_19_a_run_that_was_copied_verifies_and_goes_on_there(runs, whole, stopped, tmp_path):
    there = Path(shutil.copytree(stopped, tmp_path / "another machine" / "run"))
    shutil.rmtree(stopped)
    assert not [finding.text for finding in verify(there) if finding.wrong]
    runs.run(there, data__cache=tmp_path / "another cache")
    assert_same(whole, there)


# 20. Files that someone else made.

PAYLOAD = "<script>alert(1)</script>"


@pytest.mark.all
def test_20_a_run_of_someone_else_is_data(runs, whole, tmp_path):
    """Names and reasons with markup, and a pickle where an array was, are shown or refused, never executed."""
    theirs = Path(shutil.copytree(whole, tmp_path / "theirs & <b>"))
    (theirs / "status.json").write_text(json.dumps(read(theirs, "status") | {"why": PAYLOAD, "status": "failed"}))
    manifest = read(theirs, "manifest")
    manifest |= {"argv": [PAYLOAD], "commit": PAYLOAD, "device": {"platform": PAYLOAD, "kind": PAYLOAD, "count": 1}}
    (theirs / "manifest.json").write_text(json.dumps(manifest))
    done = call("scripts.report", theirs, whole, f"--out={tmp_path / 'report'}")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page

    proof = tmp_path / "executed"
    pickled = f"cposix\nsystem\n(S'touch {proof}'\ntR.".encode()
    for file in [*theirs.rglob("*.json*"), *(theirs / "checkpoints" / "12").rglob("*")]:
        if file.is_file():
            content = file.read_bytes()
            file.write_bytes(pickled)
            reads = file.parent == theirs and file.suffix == ".json" and file.name != "documents.json"
            said = runs.run(theirs, status=2, steps=16) if reads else ""
            assert "Traceback" not in said
            assert [finding.text for finding in verify(theirs) if finding.wrong], file
            file.write_bytes(content)
    (tmp_path / "config.json").write_text(f"__import__('os').system('touch {proof}')")
    done = fork("scripts.train", f"--workdir={tmp_path / 'x'}", f"--config=configs/resolved.py:{tmp_path}/config.json")
    assert done.returncode == 2 and not proof.exists()


def test_20_nothing_in_the_code_executes_data():
    for path in [each for folder in ("rope_lm", "scripts", "configs") for each in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{path}:{node.lineno}"
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                assert alias.name.split(".")[0] not in ("pickle", "marshal", "shelve", "dill", "yaml"), path


def test_20_a_model_that_says_two_things_and_a_tokenizer_that_changes_text_are_refused(tmp_path):
    model = Path(shutil.copytree(ROOT / "tests" / "goldens" / "models" / "llama", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "linear", "factor": 4.0}}))
    with pytest.raises(Refusal, match=r"rope_parameters=.* and rope_scaling=.* differ"):
        interop.load(model)
    coder = tokenizer.BPE.train([LINES], 260)
    content = json.loads(coder.model) | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(Refusal, match=r"tokenizer.json is damaged .*every text must come back byte by byte"):
        tokenizer.load("bpe:260", tmp_path, coder.fingerprint)


# 21. Nobody reads what a run says.


@pytest.mark.all
def test_21_a_run_whose_reader_is_gone_trains_on(runs, whole, tmp_path):
    command = [sys.executable, "-m", *runs.command(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    child.stderr.close()
    assert child.wait(timeout=300) == 0
    assert_same(whole, tmp_path)


@pytest.mark.parametrize("trains, status", [(True, 1), (False, 0)])
def test_21_a_broken_pipe_is_success_only_where_what_is_printed_is_the_product(trains, status):
    code = f"""
from scripts import entry
def main():
    raise BrokenPipeError("of a download, say")
entry.end(main, trains={trains})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == status


# 22. Settings of JAX in the environment (each of them: tests/test_environment.py).


@pytest.mark.all
def test_22_a_run_is_the_same_whatever_jax_is_told_by_the_environment(runs, whole, tmp_path):
    told = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
    told |= {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_NUMPY_RANK_PROMOTION": "raise", "NVIDIA_TF32_OVERRIDE": "1"}
    done = call(*runs.command(tmp_path), env=told)
    assert done.returncode == 0, done.stderr
    assert_same(whole, tmp_path)
    found = [read(workdir, "manifest")["environment"] for workdir in (whole, tmp_path)]
    assert run_directory.differences(*found) == [("NVIDIA_TF32_OVERRIDE", None, "1")]


# 23. Characters that stdout cannot hold.


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("env, shown", [
    ({"PYTHONIOENCODING": "latin-1"}, b"\xe9 \\u2192 \\udcff"),
    ({"PYTHONIOENCODING": "utf-8"}, "é → \\udcff".encode()),  # a file's name with a byte that is not UTF-8
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"\\xe9 \\u2192 \\udcff"),
])  # fmt: skip
def test_23_no_character_ends_a_command(env, shown, trains):
    program = "from scripts import entry; from rich.console import Console; text = '\\xe9 \\u2192 \\udcff'\n"
    program += f"entry.end(lambda: print(text) or Console().print(text) or 0, trains={trains})"
    for out in (subprocess.PIPE, subprocess.DEVNULL):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=os.environ | env, stdout=out, stderr=subprocess.PIPE
        )
        assert done.returncode == 0 and not done.stderr
        assert done.stdout is None or done.stdout.splitlines() == [shown] * 2


# 24. What a user exports or types is checked before work begins (also tests/test_scripts.py, tests/test_trained.py).


@pytest.mark.all
def test_24_a_platform_that_is_not_here_is_one_line():
    done = call("scripts.train", "--config=configs/lm.py:data=probe:copy", "--dry", env={"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2 and done.stderr.startswith("error: JAX_PLATFORMS=cuda: there is no such device here")
    assert len(done.stderr.splitlines()) == 1
