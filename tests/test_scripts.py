"""The commands as people type them, in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest

from rope_lm import machine
from tests.commands import ENVIRONMENT, ROOT, Fork, call, fork

SMALL = [
    "--config.base.steps=8", "--config.base.every.evaluate=4", "--config.base.every.log=2",
    "--config.base.every.save=4", "--config.base.data.length=16", "--config.base.data.batch=4",
    "--config.base.data.validation_rows=4", "--config.base.model.width=16", "--config.base.model.layers=1",
    "--config.base.model.hidden=32", "--config.base.seeds=0,1",
]  # fmt: skip


@pytest.fixture(scope="module")
def forks() -> Iterator[Pool]:
    """Calls functions, each in a fork of a process that has imported JAX and started nothing."""
    with Fork.context.Pool(1, maxtasksperchild=1) as pool:
        yield pool


def devices(cores: int, changes: dict[str, dict[str, Any]]) -> int:
    """The number of devices that JAX sees in a process that has so many cores and trains such a config."""
    os.environ.pop("XLA_FLAGS", None)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    config: dict[str, dict[str, Any]] = {
        "data": {"batch": 4},
        "optimizer": {"accumulation_steps": 1},
        "mesh": {"member": 1, "data": -1, "fsdp": 1, "tensor": 1},
    }
    for section in changes:
        config[section] |= changes[section]
    import jax

    from scripts import entry

    entry.cores_as_devices(config)
    return jax.device_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be given away here")
@pytest.mark.parametrize(
    "cores, flags, devices_seen",
    [
        (2, {}, 2),
        (1, {}, 1),
        (2, {"data": {"batch": 3}}, 1),  # three rows are not shared evenly by two
        (2, {"optimizer": {"accumulation_steps": 4}}, 1),  # nor is a piece of one row
        (2, {"mesh": {"data": 1}}, 1),
        # Refused later, in a line:
        (2, {"data": {"batch": 0}}, 1),
        (2, {"data": {"batch": "many"}}, 1),
        (2, {"optimizer": {"accumulation_steps": 2.5}}, 1),
        (2, {"mesh": {"tensor": None}}, 1),
    ],
)
def test_every_core_is_a_device_where_they_share_the_batch_evenly(forks, cores, flags, devices_seen):
    if machine.cores() < cores:
        pytest.skip(f"there are no {cores} cores here")
    assert forks.apply(devices, (cores, flags)) == devices_seen


def test_xla_is_told_how_many_threads_to_have():
    """As many as this process has cores, or as its quota is worth (machine.py)."""
    program = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from scripts import entry
entry.end(lambda: print(os.environ["NPROC"]) or 0)
"""
    env = {key: value for key, value in os.environ.items() if key != "NPROC"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("env, shown", [
    ({"PYTHONIOENCODING": "latin-1"}, b"\xe9 \\u2192 \\udcff"),
    ({"PYTHONIOENCODING": "utf-8"}, "é → \\udcff".encode()),  # a file's name with a byte that is not UTF-8
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"\\xe9 \\u2192 \\udcff"),
])  # fmt: skip
def test_no_character_ends_a_command(env, shown, trains):
    program = "from scripts import entry; from rich.console import Console; text = '\\xe9 \\u2192 \\udcff'\n"
    program += f"entry.end(lambda: print(text) or Console().print(text) or 0, trains={trains})"
    for out in (subprocess.PIPE, subprocess.DEVNULL):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=os.environ | env, stdout=out, stderr=subprocess.PIPE
        )
        assert done.returncode == 0 and not done.stderr
        assert done.stdout is None or done.stdout.splitlines() == [shown] * 2


def test_jax_starts_whatever_pinned_settings_say():
    program = "import os; from scripts import entry; entry.end(lambda: print(os.environ.get('JAX_ENABLE_X64')) or 0)"
    env = os.environ | {"JAX_ENABLE_X64": "maybe"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize(
    "script", sorted({path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__", "entry"})
)
def test_help_is_worth_reading(script):
    done = fork(f"scripts.{script}", "--help")
    assert done.returncode == 0
    assert f"python -m scripts.{script}" in done.stdout and "exit status" in done.stdout.lower()
    assert 10 < len(done.stdout.splitlines()) < 60


def test_a_script_can_be_run_as_a_file_from_any_folder_and_its_help_cut_off(tmp_path):
    command = f"{sys.executable} {ROOT}/scripts/train.py --help | head -1"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "Train one run: one encoding, one or several seeds.\n" and not done.stderr
    for script in {*(ROOT / "scripts").glob("*.py")} - {
        ROOT / "scripts" / name for name in ("__init__.py", "entry.py")
    }:
        assert "\nsys.path.insert(0, str(Path(__file__).parents[1]))" in script.read_text(), script


@pytest.mark.parametrize("script, words", [
    ("reproduce", "arguments go to the sweep"), ("setup", "what training needs"),
])  # fmt: skip
def test_shell_scripts_have_help_and_begin_nothing_then(script, words):
    done = subprocess.run([ROOT / "scripts" / f"{script}.sh", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and words in done.stdout and "#" not in done.stdout


MISTAKES = [
    (["scripts.train"], "--config is missing"),
    (["scripts.train", "--config=configs/lm.py"], "--workdir is missing"),
    (
        ["scripts.train", "--config=configs/lm.py:position=rotery", "--workdir=W"],
        "unknown position 'rotery': did you mean",
    ),
    (["scripts.train", "--config=configs/nowhere.py", "--workdir=W"], "there is no file 'configs/nowhere.py'"),
    (
        ["scripts.train", "--config=configs/lm.py", "--config.lr=1e-3", "--workdir=W"],
        "mean --config.optimizer.learning_rate?",
    ),
    (
        ["scripts.train", "--config=configs/lm.py", "--config.modle.width=3", "--workdir=W"],
        "mean --config.model.width?",
    ),
    (["scripts.train", "--config=configs/lm.py", "--config.optimizer.rate=1"], "did you mean --config.optimizer.learn"),
    (["scripts.train", "--config=configs/lm.py", "--steps=5", "--workdir=W"], "--steps: did you mean --config.steps?"),
    (["scripts.train", "--config=configs/lm.py", "--config.epochs=5", "--workdir=W"], "did you mean --config.steps?"),
    (["scripts.train", "--config=configs/lm.py", "--config.base.steps=5"], "did you mean --config.steps?"),
    (
        ["scripts.train", "--config=configs/lm.py", "--config.optimizer.momentum=1"],
        "the keys are optimizer.accumulation",
    ),
    (
        ["scripts.train", "--config=configs/lm.py:scale=tiny", "--config.position=alibi"],
        "a position is chosen in the config string: --config=configs/lm.py:scale=tiny,position=alibi",
    ),
    (
        ["scripts.train", "--config=configs/lm.py", "--config.model.position=alibi"],
        "a position is chosen in the config string: --config=configs/lm.py:position=alibi",
    ),
    (["scripts.train", "--config=configs/lm.py", "--config.optimizer=adamw"], "this is a section; set one of its keys"),
    (
        ["scripts.sweep", "--config=configs/ablation.py:quick", "--workdir=W", "--config.steps=5"],
        "unknown flag --config.steps: did you mean --config.base.steps?",
    ),
    (
        ["scripts.sweep", "--config=configs/ablation.py:quick", "--config.lr=1"],
        "did you mean --config.base.optimizer.le",
    ),
    (["scripts.sweep", "--config=configs/ablation.py:quick", "--config.position=alibi"], "--only picks arms"),
    (["scripts.train", "--config=configs/lm.py", "--config.steps=many", "--workdir=W"], "many"),
    (["scripts.train", "--config=configs/lm.py", "--config.steps=1.5", "--workdir=W"], "1.5"),
    (["scripts.train", "--config=configs/lm.py", "--wrokdir=W"], "wrokdir"),
    (["scripts.train", "--config=configs/lm.py", "--workdir=W", "extra"], "unexpected argument 'extra'"),
    (
        ["scripts.train", "--config=configs/lm.py", "--workdir=W", "--config.optimizer.gradient_clip=nan"],
        "optimizer.gradient_clip=nan",
    ),
    (
        ["scripts.train", "--config=configs/lm.py", "--workdir=W", "--config.optimizer.gradient_clip=inf"],
        "optimizer.gradient_clip=inf: must be a finite number",
    ),
    (["scripts.train", "--config=configs/ablation.py:quick", "--dry"], "python -m scripts.sweep trains, or lists"),
    (["scripts.train", "--config=configs/ablation.py:quick", "--workdir=W"], "that of a sweep"),
    (["scripts.train", "--config=configs/lm.py:data=text:/none", "--workdir=W"], "no such file or folder"),
    (["scripts.train", "--config=configs/lm.py", "--workdir=W", "--config.data.cache=~no-one/a"], "home folder"),
    (
        ["scripts.train", "--config=configs/lm.py", "--workdir=~no-one/a"],
        "--workdir=~no-one/a: there is no home folder",
    ),
    (["scripts.train", "--config=configs/lm.py", "--workdir=W\udcff"], "w\\udcff' is not UTF-8"),
    (["scripts.sweep", "--config=configs/ablation.py:quick", "--workdir=W\udcff"], "w\\udcff' is not UTF-8"),
    (["scripts.verify", "~no-one/a"], "there is no home folder ~no-one here"),
    (
        ["scripts.sweep", "--config=configs/ablation.py:quikc", "--workdir=W"],
        "unknown sweep 'quikc': did you mean quick",
    ),
    (
        ["scripts.sweep", "--config=configs/ablation.py:quick", "--workdir=W", "--only=rotry"],
        "unknown arm in --only",
    ),
    (["scripts.sweep", "--config=configs/lm.py", "--workdir=W"], "a sweep has base, arms and claims"),
    (
        [
            "scripts.sweep",
            "--config=configs/ablation.py:quick",
            "--workdir=W",
            "--config.base.optimizer.learning_rate=1e-3",
        ],
        "--config.base.optimizer.learning_rate does not reach arms learned, none, relative_bias, rotary, "
        "sinusoidal, which have their own: set it by --config.arms.ARM.optimizer.learning_rate",
    ),
    (["scripts.benchmark", "--scale=tny"], "unknown --scale 'tny': did you mean tiny"),
    (["scripts.benchmark", "--encodings=rotary,rope"], "unknown --encodings 'rope'"),
    (["scripts.benchmark", "--shape=width=0"], "--shape=width=0: must be a whole number of at least 1"),
    (["scripts.benchmark", "--shape=widht=8"], "did you mean width"),
    (["scripts.report", "nowhere", "--out=W"], "holds no run"),
    (["scripts.report", "tests", "--out=W", "--against=none.json"], "--against='none.json' cannot be read"),
]


def test_scripts_resolve_paths_in_one_place():
    for script in (ROOT / "scripts").glob("*.py"):
        assert not re.search(r"type=Path|Path\(arguments|expanduser", script.read_text()), f"{script}: use entry.path"


def test_the_files_of_a_config_may_be_in_the_home_folder(tmp_path):
    done = fork("scripts.train", "--config=~/none.py", "--workdir=w", env={"HOME": str(tmp_path)})
    assert done.returncode == 2 and f"there is no file '{tmp_path}/none.py'" in done.stderr


def assert_one_clear_line(done: subprocess.CompletedProcess, says: str, workdir: Path) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
    assert not workdir.exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize("words, says", MISTAKES)
def test_a_mistake_is_one_clear_line_and_status_2(words, says, tmp_path):
    words = [word.replace("=W", f"={tmp_path / 'w'}") for word in words]
    assert_one_clear_line(fork(*words), says, tmp_path / "w")


@pytest.mark.parametrize("script", ["train", "sweep", "report"])
def test_a_mistake_is_one_clear_line_also_where_python_is_started_anew(script, tmp_path):
    words, says = next(mistake for mistake in reversed(MISTAKES) if mistake[0][0] == f"scripts.{script}")
    words = [word.replace("=W", f"={tmp_path / 'w'}") for word in words]
    assert_one_clear_line(call(*words), says, tmp_path / "w")


@pytest.mark.parametrize("flag", ["--dry", "--time", "--workdir=w"])
def test_a_config_of_ones_own_that_lacks_a_section_is_one_line(flag, tmp_path):
    (tmp_path / "own.py").write_text(
        "from configs import lm\n"
        "def get_config():\n"
        "    config = lm.get_config('data=probe:copy')\n"
        "    del config['model']\n"
        "    return config\n"
    )
    done = fork("scripts.train", "--config=own.py", flag, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: config lacks the section model: start from configs/lm.py\n")


def flags(text: Path, cache: str) -> list[str]:
    return [*SMALL, f"--config.base.data.name=text:{text}", f"--config.base.data.cache={cache}"]


def test_a_sweep_from_any_folder_then_its_report(text, cache, tmp_path):
    sweep = ["scripts.sweep", "--workdir=s", f"--config={ROOT}/configs/ablation.py:quick", "--only=rotary,none"]
    sweep += flags(text, cache)
    home = {"HOME": str(tmp_path)}
    done = fork(*sweep, "--workdir=~/s", cwd=ROOT, env=home)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished") >= 2
    written = (tmp_path / "s" / "rotary" / "metrics.jsonl").stat().st_mtime_ns
    again = fork(*sweep, cwd=tmp_path)
    assert again.returncode == 0
    assert (tmp_path / "s" / "rotary" / "metrics.jsonl").stat().st_mtime_ns == written, "finished arms are not redone"
    report = fork("scripts.report", "~/s", "--out=~/r", cwd=ROOT, env=home)
    assert report.returncode == 0, report.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert {arm["arm"] for arm in summary["arms"]} == {"rotary", "none"} and not summary["warnings"]
    assert str(tmp_path / "r" / "index.html") in report.stdout
    other = fork(*sweep, "--only=none", "--config.base.seeds=3", cwd=tmp_path)
    assert other.returncode == 1 and other.stderr.count("refused") == 1, "a finished run of another config"


def test_a_dry_sweep_says_what_it_would_train_and_writes_nothing(text, cache, tmp_path):
    sweep = ["scripts.sweep", "--workdir=s", f"--config={ROOT}/configs/ablation.py:quick", "--only=rotary,none"]
    dry = fork(*sweep, *flags(text, cache), "--dry", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "nothing was trained" in dry.stdout and "rotary" in dry.stdout and not (tmp_path / "s").exists()


@pytest.mark.all
def test_one_arm_that_fails_does_not_stop_the_others(text, cache, tmp_path):
    """`learned` finds a file where its folder of checkpoints should be; `none` is trained all the same."""
    (tmp_path / "learned").mkdir()
    (tmp_path / "learned" / "checkpoints").write_text("in the way")
    sweep = ["scripts.sweep", f"--workdir={tmp_path}", "--config=configs/ablation.py:quick", "--only=learned,none"]
    done = fork(*sweep, *flags(text, cache))
    assert done.returncode == 1
    assert json.loads((tmp_path / "none" / "status.json").read_text())["status"] == "finished"
    assert json.loads((tmp_path / "learned" / "status.json").read_text())["status"] == "failed"
    assert "refused" in done.stderr and "finished" in done.stderr
    assert "checkpoints': File exists: give a folder that can be written" in done.stderr


@pytest.mark.all
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_saves_and_goes_on(text, cache, tmp_path, number):
    sweep = ["scripts.sweep", f"--workdir={tmp_path}", "--config=configs/ablation.py:quick", "--only=rotary"]
    sweep += [*flags(text, cache), "--config.base.every.save=200000"]
    long = [sys.executable, "-m", *sweep, "--config.base.steps=200000"]
    child = subprocess.Popen(long, cwd=ROOT, env=os.environ | ENVIRONMENT, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "rotary" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 8):
        time.sleep(0.1)
    began = time.monotonic()
    child.send_signal(number)
    assert child.wait(timeout=30) == 75 and time.monotonic() - began < 30
    status = json.loads((tmp_path / "rotary" / "status.json").read_text())
    assert status["status"] == "stopped" and status["step"] > 0
    done = fork(*sweep, f"--config.base.steps={status['step'] + 4}")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "rotary" / "manifest.json").read_text())
    assert [segment["step"] for segment in manifest["segments"]] == [0, status["step"]]
