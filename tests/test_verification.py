"""What scripts.verify says of a run: every finding, on a real run that was spoilt in one way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import lm
from rope_lm import journal, run
from rope_lm.verification import verify
from scripts import entry

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def good(text, cache, tmp_path_factory) -> Path:
    config = lm.get_config(f"position=rotary,data=text:{text}")
    config.steps, config.seeds = 12, (0, 1)
    config.every.update({"evaluate": 4, "save": 6, "log": 2})
    config.data.update({"length": 16, "batch": 4, "validation_rows": 6, "cache": cache})
    config.model.update({"width": 16, "heads": 2, "layers": 1, "hidden": 32})
    workdir = tmp_path_factory.mktemp("good")
    run.train(entry.plain(config), workdir, journal.provenance(["test"], {}))
    return workdir


def change(name: str, **fields: object):
    def spoil(workdir: Path) -> None:
        path = workdir / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def drop(words: str):
    """Leaves out the rows of metrics with these words."""

    def spoil(workdir: Path) -> None:
        path = workdir / "metrics.jsonl"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if words not in line))

    return spoil


def remove(name: str):
    return lambda workdir: shutil.rmtree(workdir / name) if (workdir / name).is_dir() else (workdir / name).unlink()


def write(name: str, content: str):
    return lambda workdir: (workdir / name).write_text(content)


def other_text(workdir: Path) -> None:
    fingerprint = json.loads((workdir / "manifest.json").read_text())["data"]["fingerprint"]
    change("manifest.json", data={"fingerprint": fingerprint | {"text": "0" * 64}})(workdir)


def no_text(workdir: Path) -> None:
    config = json.loads((workdir / "config.json").read_text())
    change("config.json", data=config["data"] | {"name": "text:/nowhere.txt"})(workdir)


@pytest.mark.parametrize(
    "spoil, wrong, words",
    [
        (write("checkpoints/12/about.json", "{}"), True, "checkpoint of step 12: about.json is not as it was written"),
        (remove("checkpoints/12"), True, "it finished at step 12, and its checkpoint is not there: the newest is of 6"),
        (remove("checkpoints"), True, "it finished at step 12, and its checkpoint is not there: there is none"),
        (drop('"step": 8, "member": 1, "split": "train"'), True, "lacks the train row of member 1 at step 8"),
        (drop('"split": "validation"'), True, "lacks the validation row of member 0 at step 0 and 3 more"),
        (write("metrics.jsonl", '{"step": 1'), True, "metrics.jsonl ends in a torn line"),
        (write("metrics.jsonl", "nonsense\n"), True, "metrics.jsonl line 1 is damaged"),
        (change("manifest.json", members=[]), True, "the members in manifest.json are not the seeds and rates"),
        (
            change("manifest.json", batches={"step": 12, "sha256": ["0" * 64, "1" * 64]}),
            True,
            "seed 0 consumed other batches than it should: 0000",
        ),
        (change("manifest.json", versions={"jax": "0.0.1"}), False, "jax was 0.0.1, here it is"),
        (change("manifest.json", python="2.7"), False, "Python was 2.7"),
        (change("manifest.json", commit="f" * 40), False, "the code was ffffffffffff"),
        (other_text, False, "the batches were not checked, for the text here is another (text 0000000000000000"),
        (no_text, False, "the batches were not checked, for the text is not here"),
        (change("status.json", status="running"), True, "says that it is running, and no process is"),
        (change("status.json", status="failed", why="OSError: it was full"), True, "it failed: OSError: it was full"),
        (write("manifest.json", "{torn"), True, "manifest.json is damaged"),
        (remove("status.json"), True, "status.json is missing"),
        (change("manifest.json", segments=3), True, "has not the form that this version writes"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(good, tmp_path, spoil, wrong, words):
    workdir = Path(shutil.copytree(good, tmp_path / "run"))
    spoil(workdir)
    found = [finding for finding in verify(workdir) if words in finding.text]
    assert found and found[0].wrong == wrong and "\n" not in found[0].text, list(verify(workdir))


def test_a_run_that_nothing_happened_to_has_nothing_wrong(good):
    assert not [finding.text for finding in verify(good) if finding.wrong]


def test_the_command_says_it_of_every_run_in_a_folder(good, tmp_path):
    shutil.copytree(good, tmp_path / "a")
    shutil.copytree(good, tmp_path / "b")
    call = lambda *paths: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "scripts.verify", *paths], cwd=ROOT, capture_output=True, text=True
    )
    done = call(tmp_path)
    assert done.returncode == 0 and done.stdout.count("nothing is wrong") == 2, done.stdout + done.stderr
    drop('"step": 8')(tmp_path / "b")
    done = call(tmp_path)
    assert done.returncode == 1 and f"{tmp_path / 'a'}: nothing is wrong" in done.stdout
    assert f"{tmp_path / 'b'}: wrong: metrics.jsonl lacks" in done.stdout
    done = call(tmp_path / "nothing")
    assert done.returncode == 2 and "holds no run" in done.stderr and "Traceback" not in done.stderr
