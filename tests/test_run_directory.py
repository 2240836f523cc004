"""The run directory: what is refused, what survives."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rope_lm import run_directory, tensorboard
from rope_lm.analysis import load
from rope_lm.provenance import provenance
from rope_lm.refusal import Refusal
from rope_lm.run_directory import RunDirectory
from rope_lm.sweep.arms import status

CONFIG = {"steps": 10, "seeds": (0, 1), "model": {"width": 64}, "every": {"log": 1, "save": 5}, "data": {"cache": "a"}}
MANIFEST = {
    **provenance(["train", "--x"], {"steps": 10}),
    "members": [{"member": 0, "seed": 0, "learning_rate": 0.1}, {"member": 1, "seed": 1, "learning_rate": 0.1}],
    "device": {"platform": "cpu", "kind": "cpu", "count": 1},
    "data": {"fingerprint": {"text": "t" * 64, "tokenizer": "bytes-1"}},
}


def row(step: int, member: int = 0, nats: float = 1.5, split: str = "train") -> dict:
    return {"step": step, "member": member, "split": split, "nats": nats, "tokens": 8, "seconds": step / 10}


def ran(workdir: Path) -> None:
    with RunDirectory(workdir, CONFIG, MANIFEST) as run:
        run.begin(0, {})
        run.write([row(1), row(2), row(2, 1, float("nan"))])
        run.update({"compile_seconds": 1.5})
        run.finish("stopped", "SIGTERM", 2, {})


def test_a_run_directory_holds_what_it_should(tmp_path):
    ran(tmp_path)
    _, manifest, status = run_directory.read(tmp_path)
    assert run_directory.read_json(tmp_path / "config.json") == json.loads(json.dumps(CONFIG))
    assert (
        manifest["versions"]["jax"] and manifest["argv"] == ["train", "--x"] and manifest["overrides"] == {"steps": 10}
    )
    assert len(manifest["commit"]) == 40 and manifest["compile_seconds"] == 1.5 and len(manifest["segments"]) == 1
    assert status | {"time": ""} == {
        "status": "stopped", "why": "SIGTERM", "step": 2, "saved": 0, "steps": 10, "diverged": {}, "time": "",
    }  # fmt: skip
    rows = run_directory.read_rows(tmp_path / "metrics.jsonl")
    assert [row["nats"] for row in rows] == [1.5, 1.5, None]


def test_tensorboard_reads_every_member(tmp_path):
    ran(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "member_0")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/nats")] == [(1, 1.5), (2, 1.5)]


def test_the_curves_of_a_segment_come_after_those_before_it_though_the_clock_was_moved_back(tmp_path, monkeypatch):
    ran(tmp_path)
    real = tensorboard.time.time
    monkeypatch.setattr(tensorboard.time, "time", lambda: real() - 86_400)
    with RunDirectory(tmp_path, CONFIG, MANIFEST) as run:
        run.begin(1, {})
        run.write([row(2, nats=0.5)])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "member_0")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/nats")] == [(1, 1.5), (2, 0.5)]


def test_a_line_that_is_no_row_is_named(tmp_path):
    ran(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('not a row\n{"step": 3}\n')
    with pytest.raises(Refusal, match=r"metrics.jsonl line 4 is damaged \('not a row'\): delete that line"):
        run_directory.read_rows(tmp_path / "metrics.jsonl")


def test_going_on_appends_a_segment_and_goes_on_counting_seconds(tmp_path, capfd):
    ran(tmp_path)
    changed = MANIFEST | {"versions": {**MANIFEST["versions"], "jax": "0.0.1"}}
    with RunDirectory(tmp_path, {**CONFIG, "steps": 20}, changed) as run:
        assert run.status["status"] == "stopped"
        run.begin(1, {})
        assert run.seconds == pytest.approx(0.1), "the row of step 2 is to be done again"
        run.write([row(2)])
    assert "versions.jax changed from " in capfd.readouterr().err
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [segment["step"] for segment in manifest["segments"]] == [0, 1] and manifest["compile_seconds"] == 1.5
    events = EventAccumulator(str(tmp_path / "tensorboard" / "member_0")).Reload()
    assert [point.step for point in events.Scalars("train/nats")] == [1, 2], "step 2 is there once"


def test_seconds_are_those_of_the_attempt_that_counts(tmp_path):
    """A slow attempt came to step 4 and was given up at 2; a fast one from there came to 6."""
    with RunDirectory(tmp_path, CONFIG, MANIFEST) as run:
        run.begin(0, {})
        run.write([row(2) | {"seconds": 2.0}, row(4) | {"seconds": 9.0}])
    with RunDirectory(tmp_path, CONFIG, MANIFEST) as run:
        run.begin(2, {})
        assert run.seconds == 2.0
        run.write([row(4) | {"seconds": 3.0}, row(6) | {"seconds": 4.0}])
    for step, seconds in ((6, 4.0), (5, 3.0), (1, 0.0)):
        with RunDirectory(tmp_path, CONFIG, MANIFEST) as run:
            run.begin(step, {})
            assert run.seconds == seconds


@pytest.mark.parametrize(
    "config, manifest, words",
    [
        ({"model": {"width": 128}}, {}, r"model.width: 64 -> 128\): use another --workdir"),
        ({"seeds": (0, 2)}, {}, r"seeds: \[0, 1\] -> \[0, 2\]"),
        (
            {},
            {"data": {"fingerprint": {"text": "u" * 64, "tokenizer": "bytes-1"}}},
            "fingerprint of text: tttt.* -> uuuu",
        ),
        (
            {},
            {"data": {"fingerprint": {"text": "t" * 64, "tokenizer": "bpe"}}},
            "fingerprint of tokenizer: bytes-1 -> bpe",
        ),
    ],
)
def test_another_run_in_the_same_workdir_is_refused_with_the_difference(tmp_path, config, manifest, words):
    ran(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    with pytest.raises(Refusal, match=words):
        RunDirectory(tmp_path, CONFIG | config, MANIFEST | manifest)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.json*")}


@pytest.mark.parametrize("change", [{"steps": 11}, {"every": {"log": 2, "save": 1}}, {"data": {"cache": "b"}}])
def test_what_changes_no_step_may_change(tmp_path, change):
    ran(tmp_path)
    RunDirectory(tmp_path, CONFIG | change, MANIFEST).__exit__()


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"workdir .* cannot be written \(Not a directory\): choose another"):
        RunDirectory(tmp_path / "file" / "run", CONFIG, MANIFEST)


def test_only_a_lock_that_is_taken_counts_as_held(tmp_path, monkeypatch):
    assert run_directory.holder(tmp_path) is None
    real = fcntl.flock

    def nfs(file, how: int) -> None:
        """Where locks are of bytes, not of files: an exclusive one asks for a file that can be written."""
        if how & fcntl.LOCK_EX and not file.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, how)

    def none(file, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", nfs)
    with RunDirectory(tmp_path, CONFIG, MANIFEST):
        assert f"process {os.getpid()} on " in run_directory.holder(tmp_path)
    assert run_directory.holder(tmp_path) is None
    monkeypatch.setattr(fcntl, "flock", none)
    for ask in (run_directory.holder, lambda workdir: RunDirectory(workdir, CONFIG, MANIFEST)):
        with pytest.raises(Refusal, match=r"\.lock cannot be locked \(No locks available\): use a --workdir on"):
            ask(tmp_path)


def test_a_run_whose_process_is_gone_is_lost_wherever_its_status_is_shown(tmp_path):
    with RunDirectory(tmp_path / "a", CONFIG | {"optimizer": {}}, MANIFEST) as run:
        run.begin(0, {})
        assert status(tmp_path, "a")["status"] == run_directory.present(run.workdir, run.status)["status"] == "running"
    found = run_directory.present(tmp_path / "a", run.status)
    assert run.status["status"] == "running" and found["status"] == "lost" and "its process is gone" in found["why"]
    assert status(tmp_path, "a") == found == load(tmp_path).runs[0].status
    assert run_directory.present(tmp_path / "a", {"status": "finished"}) == {"status": "finished"}


def test_who_may_only_read_a_run_can_ask_who_trains_it():
    """Asked by a process that is not root: root may write every file."""
    with tempfile.TemporaryDirectory() as folder:
        workdir, mine = Path(folder), os.geteuid()
        os.chmod(folder, 0o755)
        with RunDirectory(workdir, CONFIG, MANIFEST):
            (workdir / ".lock").chmod(0o444)
            if mine == 0:
                os.seteuid(65534)
            try:
                held = run_directory.holder(workdir)
            finally:
                os.seteuid(mine)
        assert f"process {os.getpid()} on " in held


def test_a_torn_last_line_is_no_row(tmp_path):
    ran(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "member": 0, "spl')
    with RunDirectory(tmp_path, CONFIG, MANIFEST) as run:
        run.begin(2, {})
        run.write([row(3)])
    assert [row["step"] for row in run_directory.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]


def test_a_full_disk_is_an_error_and_leaves_no_torn_line(tmp_path):
    """A real limit on the file's size, in a process of its own."""
    line = json.dumps(row(1)) + "\n"
    code = (
        "import resource, signal, sys; sys.path.insert(0, '.');"
        "from pathlib import Path; from rope_lm.run_directory import append;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        f"path = Path({str(tmp_path / 'metrics.jsonl')!r})\n"
        f"while True: append(path, {line!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode != 0 and "OSError" in done.stderr
    assert len(run_directory.read_rows(tmp_path / "metrics.jsonl")) == 1000 // len(line), "a line was torn"


def test_a_damaged_file_is_named(tmp_path):
    ran(tmp_path)
    (tmp_path / "manifest.json").write_text('{"members": [')
    with pytest.raises(Refusal, match=r"manifest.json is damaged .*restore it, or use another --workdir"):
        RunDirectory(tmp_path, CONFIG, MANIFEST)


def test_provenance_knows_a_changed_checkout(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", Path(__file__).parents[1], clone], check=True)
    code = "from rope_lm.provenance import provenance; p = provenance([], {}); print(p['commit'], bool(p['diff']))"

    def ask() -> list[str]:
        env = os.environ | {"PYTHONPATH": str(clone)}
        return subprocess.run(
            [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, env=env
        ).stdout.split()

    assert ask()[1] == "False"
    (clone / "rope_lm" / "refusal.py").write_text((clone / "rope_lm" / "refusal.py").read_text() + "# changed\n")
    assert ask()[1] == "True"
