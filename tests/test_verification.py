"""Every finding of a verification, on a real run that was spoilt in one way."""

import json
import shutil
from pathlib import Path

import pytest

from rope_lm import loop
from rope_lm.provenance import provenance
from rope_lm.verification import verify
from scripts import entry
from scripts import verify as script
from tests.runs import small


@pytest.fixture(scope="module")
def good(text, cache, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("good")
    loop.train(small(text, cache), workdir, provenance(["test"], {}))
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
        (write("checkpoints/6/about.json", "{}"), True, "checkpoint of step 6: about.json is not as it was written"),
        (remove("checkpoints/6"), True, "it finished at step 6, and its checkpoint is not there: the newest is of 4"),
        (remove("checkpoints"), True, "it finished at step 6, and its checkpoint is not there: there is none"),
        (drop('"step": 4, "member": 1, "split": "train"'), True, "lacks the train row of member 1 at step 4"),
        (drop('"split": "validation"'), True, "lacks the validation row of member 0 at step 0 and 2 more"),
        (write("metrics.jsonl", '{"step": 1'), True, "metrics.jsonl ends in a torn line"),
        (write("metrics.jsonl", "nonsense\n"), True, "metrics.jsonl line 1 is damaged"),
        (
            change("manifest.json", members=[]),
            True,
            "the members in manifest.json are not the seeds and learning rates",
        ),
        (
            change("manifest.json", batches={"step": 6, "sha256": ["0" * 64, "1" * 64]}),
            True,
            "seed 0 consumed other batches than it should: 0000",
        ),
        (change("manifest.json", versions={"jax": "0.0.1"}), False, "jax was 0.0.1, here it is"),
        (change("manifest.json", python="2.7"), False, "python was 2.7, here it is"),
        (change("manifest.json", commit="f" * 40), False, "commit was ffffffffffff"),
        (other_text, False, "the batches were not checked, because the text here is another (text 0000000000000000"),
        (no_text, False, "the batches were not checked, because the text is not here"),
        (change("status.json", status="running"), True, "says that it is running, and no process is"),
        (change("status.json", status="failed", why="OSError: it was full"), True, "it failed: OSError: it was full"),
        (write("manifest.json", "{torn"), True, "manifest.json is damaged"),
        (remove("status.json"), True, "status.json is missing"),
        (change("documents.json", tokens=[1]), True, "metrics.jsonl"),
        (change("documents.json", nats=3), True, "is not in this version's format"),
        (change("manifest.json", segments=3), True, "is not in this version's format"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(good, tmp_path, spoil, wrong, words):
    workdir = Path(shutil.copytree(good, tmp_path / "run"))
    spoil(workdir)
    found = [finding for finding in verify(workdir) if words in finding.text]
    assert found and found[0].wrong == wrong and "\n" not in found[0].text, list(verify(workdir))


def test_a_run_that_nothing_happened_to_has_nothing_wrong(good):
    assert not [finding.text for finding in verify(good) if finding.wrong]


def test_losses_by_document_that_are_not_those_of_the_metrics_are_found(good, tmp_path):
    workdir = Path(shutil.copytree(good, tmp_path / "run"))
    documents = json.loads((workdir / "documents.json").read_text())
    documents["nats"][1][0] *= 1.01
    (workdir / "documents.json").write_text(json.dumps(documents))
    wrong = [finding.text for finding in verify(workdir) if finding.wrong]
    assert len(wrong) == 1 and "over 96 tokens for member 1 at step 6" in wrong[0]


def test_the_command_says_it_of_every_run_in_a_folder(good, tmp_path, monkeypatch, capsys):
    shutil.copytree(good, tmp_path / "a")
    shutil.copytree(good, tmp_path / "b")

    def call(path: Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["verify", str(path)])
        return script.main(), capsys.readouterr().out

    status, said = call(tmp_path)
    assert status == 0 and said.count("nothing is wrong") == 2, said
    drop('"step": 4')(tmp_path / "b")
    status, said = call(tmp_path)
    assert status == 1 and f"{tmp_path / 'a'}: nothing is wrong" in said
    assert f"{tmp_path / 'b'}: wrong: metrics.jsonl lacks" in said
    monkeypatch.setattr("sys.argv", ["verify", str(tmp_path / "nothing")])
    monkeypatch.setenv("NPROC", "")  # else `end` would set it for the tests that follow
    with pytest.raises(SystemExit) as ended:
        entry.end(script.main)
    assert ended.value.code == 2 and "holds no run" in capsys.readouterr().err
