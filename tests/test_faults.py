"""What survives: each row is a fault that is really injected into a real process, and what has to come of it.

The numbers are those of the table "What survives" in README.md.
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
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rope_lm import data, distance, run_directory
from rope_lm.analysis import load
from rope_lm.checkpoint import damage
from rope_lm.refusal import Refusal
from rope_lm.verification import verify

ROOT = Path(__file__).parents[1]
STOPPED = 75
SMALL = {
    "steps": 60, "seeds": "0,1", "every.evaluate": 10, "every.log": 5, "every.save": 10, "data.length": 16,
    "data.batch": 4, "data.validation_rows": 4, "model.width": 16, "model.heads": 2, "model.layers": 1, "model.hidden": 32,
}  # fmt: skip


class Runs:
    """Starts real runs of one small config."""

    def __init__(self, text: Path, cache: str):
        self.text, self.cache = text, cache

    def command(self, workdir: Path, *faults: str, **changes: object) -> list[str]:
        settings = SMALL | {"data.cache": self.cache} | {key.replace("__", "."): changes[key] for key in changes}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        config = f"--config=configs/lm.py:position=rotary,data=text:{self.text}"
        script = ["tests.faulty", *faults, "--"] if faults else ["scripts.train"]
        return [sys.executable, "-m", *script, f"--workdir={workdir}", config, *flags]

    def start(self, workdir: Path, *faults: str, env: dict | None = None, **changes: object) -> subprocess.Popen:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {})
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command(workdir, *faults, **changes), cwd=ROOT, env=environment, **pipe)

    def run(self, workdir: Path, *faults: str, status: int = 0, **changes: object) -> str:
        """Runs to the end, which has to be of this exit status; returns what was said on stderr."""
        child = self.start(workdir, *faults, **changes)
        error = child.communicate(timeout=300)[1]
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


@pytest.fixture
def disk() -> Iterator:
    """Makes real file systems of a given size, in a mount namespace of their own; returns the folder."""
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
    newest = max(
        (each for each in (workdir / "checkpoints").iterdir() if each.name.isdigit()), key=lambda x: int(x.name)
    )
    assert damage(newest) is None
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # the run may have had more
    with ocp.StandardCheckpointer() as orbax:
        saved = orbax.metadata(newest / "state").item_metadata
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
        return int(newest.name), [np.asarray(leaf) for leaf in jax.tree.leaves(orbax.restore(newest / "state", target))]


def metrics(workdir: Path) -> dict:
    """What was measured, the last time that it was: (split, member, step) -> numbers that no clock decides."""
    keys = ("nats", "gradient_norm", "learning_rate", "tokens")
    rows = run_directory.read_rows(workdir / "metrics.jsonl")
    return {(row["split"], row["member"], row["step"]): [row.get(key) for key in keys] for row in rows}


def read(workdir: Path, name: str) -> dict:
    return json.loads((workdir / f"{name}.json").read_text())


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended alike: bit for bit the same state, the same metrics, the same batches."""
    (step, leaves), (other_step, other_leaves) = state(a), state(b)
    assert step == other_step and len(leaves) == len(other_leaves)
    for x, y in zip(leaves, other_leaves, strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()
    assert metrics(a) == metrics(b)
    assert read(a, "manifest")["batches"] == read(b, "manifest")["batches"]
    assert not [finding.text for finding in verify(b) if finding.wrong]


def until(what, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


# 1. SIGTERM and SIGINT in the middle of a step, during an evaluation, during a save.


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", ["step:33", "evaluation:3", "save:2"])
def test_01_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(runs, whole, tmp_path, moment, name):
    child = runs.start(tmp_path, f"{moment}:{name}")
    child.communicate(timeout=300)
    assert child.returncode == STOPPED
    status = read(tmp_path, "status")
    assert status["status"] == "stopped" and name in status["why"] and 0 < status["step"] < 60
    runs.run(tmp_path)
    assert [each["step"] for each in read(tmp_path, "manifest")["segments"]] == [0, status["step"]]
    assert_same(whole, tmp_path)


def test_01_it_ends_within_seconds_of_the_signal(runs, tmp_path):
    child = runs.start(tmp_path, steps=10**6, every__save=10**6)
    until(lambda: (tmp_path / "metrics.jsonl").exists() and len(run_directory.read_rows(tmp_path / "metrics.jsonl")) > 10)
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == STOPPED and time.monotonic() - began < 30


# 2. SIGKILL at random moments.


@pytest.mark.all
def test_02_thirty_kills_at_random_moments_change_no_bit(runs, tmp_path):
    changes = {"steps": 4000, "every__save": 20, "every__evaluate": 400, "every__log": 100}
    runs.run(tmp_path / "whole", **changes)
    workdir = tmp_path / "killed"
    saves = lambda: {each.name for each in workdir.glob("checkpoints/[0-9]*")}  # noqa: E731
    torn, moments = 0, random.Random(0)
    for _ in range(30):
        before = saves()
        child = runs.start(workdir, **changes)
        until(lambda before=before: saves() - before)
        time.sleep(0.4 * moments.random())
        child.kill()
        child.communicate()
        torn += any(not (each / "sha256.json").exists() for each in workdir.glob("checkpoints/[0-9]*"))
    assert read(workdir, "status")["status"] == "running", "all thirty hit a run at work"
    assert torn > 3, "some hit a save"
    runs.run(workdir, **changes)
    assert_same(tmp_path / "whole", workdir)
    left = {each.name for each in (workdir / "checkpoints").iterdir()}
    assert left == {"3980", "4000"}, "what the kills left is gone"


def test_02_a_kill_in_the_middle_of_a_save(runs, whole, tmp_path):
    runs.run(tmp_path, "save:3:SIGKILL", status=-signal.SIGKILL)
    assert not (tmp_path / "checkpoints" / "30" / "sha256.json").exists(), "the save was torn"
    assert (tmp_path / "checkpoints" / "30").exists() and (tmp_path / "checkpoints" / "20" / "sha256.json").exists()
    runs.run(tmp_path)
    assert read(tmp_path, "manifest")["segments"][1]["step"] == 20
    left = {each.name for each in (tmp_path / "checkpoints").iterdir()}
    assert left == {"50", "60"}, "the torn save is no damage: it is gone"
    assert_same(whole, tmp_path)


# 3. A second signal during the save that the first one caused.


def test_03_a_second_signal_does_not_tear_the_save(runs, whole, tmp_path):
    runs.run(tmp_path, "step:17:SIGTERM", "save:2:SIGTERM", status=STOPPED)
    assert state(tmp_path)[0] == read(tmp_path, "status")["step"]
    runs.run(tmp_path)
    assert_same(whole, tmp_path)


# 4 and 5. Damage to checkpoints (to each of their files: tests/test_checkpoint.py).


def hurt(folder: Path, how: str) -> Path:
    """Damages the largest file of a checkpoint."""
    file = max((each for each in folder.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "a byte flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "truncated":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    return file


@pytest.mark.parametrize("how", ["a byte flipped", "truncated", "deleted"])
def test_04_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(runs, whole, tmp_path, how):
    runs.run(tmp_path, "step:41:SIGTERM", status=STOPPED)
    newest = state(tmp_path)[0]
    file = hurt(tmp_path / "checkpoints" / str(newest), how)
    assert [each.text for each in verify(tmp_path) if each.wrong and file.name in each.text]
    said = runs.run(tmp_path)
    assert f"checkpoint step {newest}: " in said and file.name in said and f"bad/{newest}.0" in said
    assert f"stood at step {newest}, goes on from step 40" in said
    assert_same(whole, tmp_path)  # it has its last checkpoint: later saves were really written


def test_05_where_no_checkpoint_is_whole_the_run_refuses_and_never_starts_from_zero(runs, tmp_path):
    runs.run(tmp_path, "step:25:SIGTERM", status=STOPPED)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for folder in list((tmp_path / "checkpoints").iterdir()):
        hurt(folder, "truncated")
    said = runs.run(tmp_path, status=2)
    assert "is whole (step 2" in said and "; step 20: " in said and "delete the run's folder" in said
    again = runs.run(tmp_path, status=2)
    assert "is whole (bad/2" in again, "the second time too"
    shutil.rmtree(tmp_path / "checkpoints")
    assert "its checkpoints are gone" in runs.run(tmp_path, status=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("fault, step", [("save:1:SIGKILL", 0), ("save:2:SIGKILL", 10)])
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


def test_06_a_disk_that_fills_while_saving(runs, disk):
    small = disk("900k")
    wide = {"seeds": "0", "model__width": 64, "steps": 4000, "every__save": 50, "every__log": 50}
    said = runs.run(small / "run", status=1, **wide)
    assert "No space left on device" in said.splitlines()[-1] and "goes on from the last checkpoint" in said
    status = read(small / "run", "status")
    folders = (small / "run" / "checkpoints").glob("[0-9]*")  # the newest may be torn, if its sums found no room
    step = max(int(each.name) for each in folders if damage(each) is None)
    assert status["status"] == "failed" and status["step"] - step <= 2 * 50, "within one interval"
    assert run_directory.read_rows(small / "run" / "metrics.jsonl")[-1]["step"] <= status["step"]


def test_06_a_disk_that_fills_while_metrics_are_appended(runs, whole, disk):
    small = disk("2m")
    child = runs.start(small / "run", steps=10**6, every__save=10**6, every__log=1)
    until(lambda: (small / "run" / "metrics.jsonl").exists())
    with pytest.raises(OSError), open(small / "fill", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1024)
    error = child.communicate(timeout=30)[1]
    assert child.returncode == 1 and "No space left on device" in error.splitlines()[-1], error
    content = (small / "run" / "metrics.jsonl").read_bytes()
    assert content.endswith(b"}\n") and len(run_directory.read_rows(small / "run" / "metrics.jsonl")) > 1


# 7. A folder that cannot be written.


def test_07_a_read_only_workdir_is_refused_before_compiling(runs, disk):
    folder = disk("1m")
    subprocess.run(
        ["nsenter", f"--target={folder.parts[2]}", "--user", "--mount", "mount", "-o", "remount,ro", "/mnt"], check=True
    )
    said = runs.run(folder / "run", status=2, env={"JAX_LOG_COMPILES": "1"})
    assert "cannot be written (Read-only file system)" in said and "Compiling jit(step)" not in said


# 8. A torn line, steps that are done again.


def test_08_a_torn_line_is_dropped_and_replayed_steps_count_once(runs, whole, tmp_path):
    runs.run(tmp_path, "step:38:SIGKILL", status=-signal.SIGKILL)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "member": 0, "spl')
    assert [each.text for each in verify(tmp_path) if "torn line" in each.text]
    runs.run(tmp_path)
    assert read(tmp_path, "manifest")["segments"][1]["step"] in (20, 30), "35 was logged and is done again"
    steps = [row["step"] for row in run_directory.read_rows(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert steps.count(35) == 4, "two members, twice"
    curve = load(tmp_path).runs[0].curves[0]
    assert curve.steps.tolist() == list(range(0, 61, 10))
    assert_same(whole, tmp_path)


# 9. Losses that are not finite.


def test_09_a_member_that_diverges_is_frozen_and_the_others_go_on(runs, tmp_path):
    wild = {"seeds": "0", "optimizer__rate": "3e-3,1e30", "optimizer__clip": 1e30}
    runs.run(tmp_path / "one", **wild)
    status = read(tmp_path / "one", "status")
    assert status["status"] == "finished" and list(status["diverged"]) == ["1"] and "member 1 at step" in status["why"]
    assert [curve.rate for curve in load(tmp_path / "one").runs[0].curves] == [3e-3]
    report = [sys.executable, "-m", "scripts.report", tmp_path / "one", f"--out={tmp_path / 'report'}"]
    subprocess.run(report, cwd=ROOT, check=True, capture_output=True)
    assert "member 1 at step" in (tmp_path / "report" / "index.html").read_text()
    runs.run(tmp_path / "one", "step:75:SIGKILL", status=-9, **wild | {"steps": 90})
    assert read(tmp_path / "one", "status")["diverged"] == status["diverged"], "also of a run that goes on"
    assert not [each.text for each in verify(tmp_path / "one") if "lacks the" in each.text]
    found = distance.measure(tmp_path / "one", 2)
    assert found["seeds"] == [0] and len(found["mass"]) == 1, "a lost member is not measured"
    runs.run(tmp_path / "all", status=4, **wild | {"optimizer__rate": "1e30,2e30"})
    assert read(tmp_path / "all", "status")["status"] == "diverged"
    with pytest.raises(Refusal, match=r"every member of the run in .* diverged"):
        distance.measure(tmp_path / "all", 2)
    assert all(np.isfinite(leaf).all() for leaf in state(tmp_path / "all")[1]), "the last finite state is kept"


# 10. Too little memory.


def sweep(runs: Runs, workdir: Path, arms: str, **changes: object) -> list[str]:
    flags = [each.replace("--config.", "--config.base.") for each in runs.command(workdir, **changes)[5:]]
    name = f"--config.base.data.name=text:{runs.text}"
    words = [f"--workdir={workdir}", "--config=configs/ablation.py:quick", f"--only={arms}", name, *flags]
    return [sys.executable, "-m", "scripts.sweep", *words]


def trainer(workdir: Path) -> int | None:
    """The process that trains in a folder."""
    holder = run_directory.holder(workdir)
    return int(holder.split()[1]) if holder and holder.startswith("process") else None


def test_10_an_arm_that_is_killed_is_tried_three_times_and_said_to_have_failed(runs, tmp_path):
    """SIGKILL is what the kernel sends when the host is out of memory."""
    command = sweep(runs, tmp_path, "rotary", steps=10**6, every__save=100)
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    killed: set[int] = set()
    while len(killed) < 3:
        until(lambda: trainer(tmp_path / "rotary") not in (None, *killed))
        pid = trainer(tmp_path / "rotary")
        until(lambda: read(tmp_path / "rotary", "status")["status"] == "running" if killed else True)
        until(lambda: list(tmp_path.glob("rotary/checkpoints/*/sha256.json")))
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    said = child.communicate(timeout=300)[1]
    assert child.returncode == 1 and said.count("rotary: killed") == 3
    status = read(tmp_path / "rotary", "status")
    assert status["status"] == "failed" and "killed by SIGKILL" in status["why"] and "data.batch" in status["why"]


def test_10_a_device_out_of_memory_says_what_to_lower(runs, tmp_path):
    large = {"model__width": 256, "model__layers": 4, "data__length": 2048, "data__batch": 2, "data__validation": 2}
    said = runs.run(tmp_path, "memory:600", status=1, **large)
    for words in ("out of memory: lower data.batch (2) or data.length (2048)", "fewer than 2 members"):
        assert words in said.splitlines()[-1], said
    assert read(tmp_path, "status")["status"] == "failed"


# 11. Two processes, one workdir.


def test_11_the_second_process_in_a_workdir_refuses_and_a_dead_ones_lock_is_taken_over(runs, whole, tmp_path):
    first = runs.start(tmp_path, steps=10**6)
    until(lambda: trainer(tmp_path))
    said = runs.run(tmp_path, status=2, steps=10**6)
    assert f"is in use by process {first.pid} on {os.uname().nodename}" in said
    first.kill()
    first.communicate()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / ".lock").write_text("process 1 on another-host")  # of another boot, say
    runs.run(tmp_path)
    assert_same(whole, tmp_path)


# 12. Preparing text (also tests/data/test_tokens.py).


def test_12_two_runs_that_prepare_one_text_at_once_both_succeed(runs, whole, tmp_path):
    cache = {"data__cache": tmp_path / "cache"}
    children = [runs.start(tmp_path / name, **cache) for name in "ab"]
    assert [child.communicate(timeout=300) and child.returncode for child in children] == [0, 0]
    for name in "ab":
        assert_same(whole, tmp_path / name)


@pytest.mark.parametrize("how", ["a byte flipped", "truncated", "deleted"])
def test_12_tokens_that_are_damaged_are_made_again(runs, whole, tmp_path, how):
    cache = {"data__cache": tmp_path / "cache"}
    runs.run(tmp_path / "a", "step:20:SIGTERM", status=STOPPED, **cache)
    file = hurt(next(each for each in (tmp_path / "cache" / "tokens").iterdir() if each.is_dir()), how)
    assert f"{file}: not as it was written; made again" in runs.run(tmp_path / "a", **cache)
    assert_same(whole, tmp_path / "a")


# 13. Another config on resume.


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seeds": "0,2"}, "seeds: [0, 1] -> [0, 2]"),
        ({"data__batch": 8}, "data.batch: 4 -> 8"),
        ({"data__length": 8}, "data.length: 16 -> 8"),
        ({"every__evaluate": 5}, "every.evaluate: 10 -> 5"),
    ],
)
def test_13_another_config_is_refused_with_the_difference(runs, whole, change, words):
    content = lambda: {each: each.read_bytes() for each in whole.rglob("*.json*")}  # noqa: E731
    before = content()
    assert words in runs.run(whole, status=2, **change)
    assert content() == before


def test_13_another_text_is_refused_with_its_fingerprint(runs, tmp_path):
    mine = Runs(tmp_path / "mine.txt", runs.cache)
    shutil.copy(runs.text, mine.text)
    mine.run(tmp_path / "run", "step:20:SIGTERM", status=STOPPED)
    mine.text.write_text(mine.text.read_text().replace("line 7 ", "line x "))
    assert "fingerprint of text: " in mine.run(tmp_path / "run", status=2)
    assert [each.text for each in verify(tmp_path / "run") if "the text here is another" in each.text]


def test_13_the_cadence_of_logging_and_saving_may_change(runs, whole, tmp_path):
    runs.run(tmp_path, "step:31:SIGTERM", status=STOPPED)
    runs.run(tmp_path, every__log=2, every__save=7)
    assert state(tmp_path)[0] == 60 and not [each.text for each in verify(tmp_path) if each.wrong]
    shared = metrics(whole).keys() & metrics(tmp_path).keys()
    assert len(shared) > 20 and all(metrics(whole)[key] == metrics(tmp_path)[key] for key in shared)
    assert read(tmp_path, "manifest")["segments"][1]["changed"] == {"every.log": [5, 2], "every.save": [10, 7]}


# 14. Another number of devices on resume.


def test_14_devices_1_then_4_then_2(runs, whole, tmp_path):
    for count, faults, status in ((1, ["step:19:SIGTERM"], STOPPED), (4, ["step:20:SIGTERM"], STOPPED), (2, [], 0)):
        runs.run(tmp_path, *faults, status=status, env={"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"})
    segments = read(tmp_path, "manifest")["segments"]
    assert [each["device"]["count"] for each in segments] == [1, 4, 2]
    a, b = metrics(whole), metrics(tmp_path)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key][0] == pytest.approx(b[key][0], abs=1e-5), key
    assert read(whole, "manifest")["batches"] == read(tmp_path, "manifest")["batches"]


# 15. Another version of a package on resume.


def test_15_another_version_is_a_warning_and_a_segment(runs, whole, tmp_path):
    runs.run(tmp_path, "step:20:SIGTERM", status=STOPPED)
    manifest = read(tmp_path, "manifest")
    manifest["segments"][0]["versions"]["jax"] = manifest["versions"]["jax"] = "0.0.1"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert [each.text for each in verify(tmp_path) if each.text.startswith("jax was 0.0.1, here it is ")]
    assert "goes on with another versions" in runs.run(tmp_path)
    assert [each["versions"]["jax"] for each in read(tmp_path, "manifest")["segments"]] == ["0.0.1", jax.__version__]
    assert_same(whole, tmp_path)


# 16. The clock moved back.


def test_16_the_clock_is_a_day_behind_on_resume(runs, whole, tmp_path):
    runs.run(tmp_path, "step:31:SIGTERM", status=STOPPED)
    runs.run(tmp_path, "clock:-86400")
    rows = [row for row in run_directory.read_rows(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "member_0")).Reload()
    assert [each.step for each in events.Scalars("train/nats")] == list(range(5, 61, 5))
    assert_same(whole, tmp_path)


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
    "utf-16": (lambda path: path.write_bytes(LINES.decode().encode("utf-16")), "is UTF-16; convert it to UTF-8"),
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


def test_18_a_sweep_that_is_killed_goes_on_with_what_is_missing(runs, tmp_path):
    command = sweep(runs, tmp_path, "none,rotary", steps=2000, every__save=500, every__log=500)
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: trainer(tmp_path / "rotary"))
    first.kill()
    first.wait()
    before = {each: (each.stat().st_mtime_ns, each.read_bytes()) for each in (tmp_path / "none").rglob("*.json*")}
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert "rotary: waiting for process" in second.stderr, "the arm went on by itself"
    assert before == {
        each: (each.stat().st_mtime_ns, each.read_bytes()) for each in (tmp_path / "none").rglob("*.json*")
    }
    assert len(read(tmp_path / "rotary", "manifest")["segments"]) == 1
    for arm in ("none", "rotary"):
        assert not [each.text for each in verify(tmp_path / arm) if each.wrong]


def test_18_a_sweep_that_is_stopped_while_it_waits_leaves_the_other_alone(runs, tmp_path):
    command = sweep(runs, tmp_path, "rotary", steps=10**6, every__save=10**6)
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: trainer(tmp_path / "rotary") and (tmp_path / "rotary" / "metrics.jsonl").exists())
    first.kill()
    first.wait()
    pid = trainer(tmp_path / "rotary")
    second = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: "waiting for process" in second.stderr.readline())
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=60)
    assert second.returncode == STOPPED
    assert trainer(tmp_path / "rotary") == pid and read(tmp_path / "rotary", "status")["status"] == "running"
    os.kill(pid, signal.SIGTERM)
    until(lambda: trainer(tmp_path / "rotary") is None)


def test_18_arms_side_by_side_train_on_though_what_they_say_has_nowhere_to_go(runs, tmp_path):
    command = [*sweep(runs, tmp_path, "none,rotary"), "--at_once=2"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: trainer(tmp_path / "none") and trainer(tmp_path / "rotary"))
    first.kill()
    first.wait()
    until(lambda: not (trainer(tmp_path / "none") or trainer(tmp_path / "rotary")))
    assert [read(tmp_path / arm, "status")["status"] for arm in ("none", "rotary")] == ["finished"] * 2


def test_18_of_two_sweeps_that_come_to_an_arm_at_once_one_waits(runs, tmp_path):
    command = sweep(runs, tmp_path, "rotary", steps=1000, every__save=500, every__log=500)
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "sweep.json").exists())  # it measures a step, and so will the other
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert first.wait(timeout=300) == second.returncode == 0, second.stderr
    assert len(read(tmp_path / "rotary", "manifest")["segments"]) == 1


# 19. A run on another machine.


def test_19_a_run_that_was_copied_verifies_and_goes_on_there(runs, whole, tmp_path):
    runs.run(tmp_path / "here", "step:31:SIGTERM", status=STOPPED)
    there = Path(shutil.copytree(tmp_path / "here", tmp_path / "another machine" / "run"))
    shutil.rmtree(tmp_path / "here")
    assert not [each.text for each in verify(there) if each.wrong]
    runs.run(there, data__cache=tmp_path / "another cache")
    assert_same(whole, there)


# 20. Files that someone else made.

PAYLOAD = "<script>alert(1)</script>"


def test_20_a_run_of_someone_else_is_data(runs, whole, tmp_path):
    """Names and reasons with markup, and a pickle where an array was, are shown or refused, never executed."""
    theirs = Path(shutil.copytree(whole, tmp_path / "theirs & <b>"))
    (theirs / "status.json").write_text(json.dumps(read(theirs, "status") | {"why": PAYLOAD, "status": "failed"}))
    manifest = read(theirs, "manifest")
    manifest |= {"argv": [PAYLOAD], "commit": PAYLOAD, "device": {"platform": PAYLOAD, "kind": PAYLOAD, "count": 1}}
    (theirs / "manifest.json").write_text(json.dumps(manifest))
    report = [sys.executable, "-m", "scripts.report", theirs, whole, f"--out={tmp_path / 'report'}"]
    done = subprocess.run(report, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page

    proof = tmp_path / "executed"
    pickled = f"cposix\nsystem\n(S'touch {proof}'\ntR.".encode()
    for file in [*theirs.rglob("*.json*"), *(theirs / "checkpoints" / "60").rglob("*")]:
        if file.is_file():
            content = file.read_bytes()
            file.write_bytes(pickled)
            said = runs.run(theirs, status=2, steps=80) if file.parent == theirs and file.suffix == ".json" else ""
            assert "Traceback" not in said
            assert [each.text for each in verify(theirs) if each.wrong], file
            file.write_bytes(content)
    config = [sys.executable, "-m", "scripts.train", f"--workdir={tmp_path / 'x'}"]
    (tmp_path / "config.json").write_text(f"__import__('os').system('touch {proof}')")
    done = subprocess.run(
        [*config, f"--config=configs/resolved.py:{tmp_path}/config.json"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 2 and not proof.exists()


def test_20_nothing_in_the_code_executes_data():
    for path in [each for folder in ("rope_lm", "scripts", "configs") for each in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{path}:{node.lineno}"
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                assert alias.name.split(".")[0] not in ("pickle", "marshal", "shelve", "dill", "yaml"), path


# 21. Nobody reads what a run says.


def test_21_a_run_whose_reader_is_gone_trains_on(runs, whole, tmp_path):
    child = runs.start(tmp_path)
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
