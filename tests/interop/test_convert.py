"""A run exported by the command scripts.convert."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from configs import lm
from rope_lm import interop, loop, trained
from rope_lm.provenance import provenance
from rope_lm.refusal import Refusal
from scripts import convert, entry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(text: Path, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, chosen in (
        ("llama", "block=llama,position=rotary"),
        ("bert", "block=bert,position=rotary,objective=masked"),
        ("alibi", "block=llama,position=alibi"),
    ):
        config = lm.get_config(f"{chosen},data=text:{text}")
        config.steps, config.seeds = 3, (0, 1)
        config.every.update({"evaluate": 3, "save": 3, "log": 3})
        config.data.update({"length": 32, "batch": 8, "validation_rows": 6, "cache": cache})
        config.data.tokenizer = "bpe:300" if name == "llama" else "bytes"
        config.model.update({"width": 32, "heads": 2, "layers": 1})
        loop.train(entry.plain(config), folder / name, provenance(["test"], {}))
    return folder


KINDS = [("llama", "LlamaForCausalLM, 300"), ("bert", "RoFormerForMaskedLM, 258")]


@pytest.mark.parametrize("name, kind", KINDS)
def test_a_member_of_a_run_gives_the_same_logits_there_and_back(
    runs: Path,
    name: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [f"--workdir={runs / name}", "--member=1", f"--out={tmp_path / 'model'}"]
    monkeypatch.setattr(sys, "argv", ["convert", *flags])
    assert convert.main() == 0
    assert capsys.readouterr() == (f"{tmp_path / 'model'}: {kind} tokens, step 3, member 1\n", "")
    spelled = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    sample = "def main(arguments):\n    return 1\n"
    run = trained.load(runs / name)
    assert spelled.encode(sample).ids == run.coder.encode(sample.encode()).tolist()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == run.coder.separator
    back, text = interop.load(tmp_path / "model"), jnp.asarray(np.arange(64).reshape(2, 32))
    assert back.length == 32
    first, second = (model(text)[0] for model in run.models)
    np.testing.assert_allclose(interop.make(back)(text)[0], second, atol=1e-5)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--workdir=R/alibi"], "position alibi with this model.block has no layout in Hugging Face transformers"),
        (["--workdir=R/llama", "--member=2"], "the run has 2 members"),
        (["--workdir=R/none"], "holds no run"),
        (["--workdir=R/llama", "--out=R/llama/model"], "is inside the run's own folder"),
    ],
)
def test_a_run_without_layout_is_refused_and_nothing_is_written(
    runs: Path, flags: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--out={tmp_path / 'model'}", *(flag.replace("R", str(runs), 1) for flag in flags)]
    monkeypatch.setattr(sys, "argv", ["convert", *flags])
    with pytest.raises(Refusal, match=says):
        convert.main()
    assert not list(tmp_path.iterdir()) and not list(runs.glob("*/model"))


def test_a_refusal_of_the_command_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.convert", f"--workdir={tmp_path}", f"--out={tmp_path}-model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "holds no run" in done.stderr
