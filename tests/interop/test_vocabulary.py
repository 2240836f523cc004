"""The tokenizer files of a saved model give the tokens and the text of the run's tokenizer, read by another package."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rope_lm import interop
from rope_lm.data import tokenizer
from rope_lm.interop import vocabulary
from rope_lm.refusal import Refusal
from tests.data.test_tokenizer import ODD, PROSE, piece_model
from tests.interop.saved import ours

CODERS: dict[str, tokenizer.Tokenizer] = {
    "bytes": tokenizer.Bytes(),
    "bpe": tokenizer.BPE.train([PROSE.encode()], 600),
}


@pytest.mark.parametrize("name", CODERS)
@given(text=st.one_of(st.text(max_size=60), st.just(ODD)))
def test_the_tokens_and_the_text_are_those_of_the_run(name: str, text: str) -> None:
    coder = CODERS[name]
    content = json.dumps(vocabulary.files(coder, 32, masked=False)["tokenizer.json"])
    spelled = tokenizers.Tokenizer.from_str(content)
    tokens = spelled.encode(text).ids
    assert tokens == coder.encode(text.encode()).tolist()
    assert spelled.decode([*tokens, coder.separator]) == text
    assert spelled.decode([coder.separator], skip_special_tokens=False) == vocabulary.SEPARATOR


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_token_of_the_model_has_a_name(name: str, masked: bool) -> None:
    coder = CODERS[name]
    files = vocabulary.files(coder, 32, masked)
    spelled = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    assert spelled.get_vocab_size() == coder.vocabulary + masked
    config = files["tokenizer_config.json"]
    special = {token.content: number for number, token in spelled.get_added_tokens_decoder().items() if token.special}
    assert special[config["eos_token"]] == coder.separator
    assert special.get(config.get("mask_token")) == (coder.vocabulary if masked else None)
    assert config["model_max_length"] == 32 and config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_folder_with_a_tokenizer_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(Refusal, match="holds a model already"):
        interop.save(tmp_path, ours("llama", "rotary"), CODERS["bpe"])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_sentencepiece_model_stays_behind() -> None:
    coder = tokenizer.SentencePiece(piece_model(byte_fallback=True), "pieces")
    assert vocabulary.files(coder, 32, masked=False) == {}
