"""Tokenizers: exact in both directions, independent of where text is cut, trained once, and common mistakes."""

import io
import itertools
import json
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from rope_lm.data import files, tokenizer
from rope_lm.data.documents import BLOCK, Request
from rope_lm.data.documents import blocks as in_blocks
from rope_lm.refusal import Refusal
from tests.data.conftest import Make

ROOT = Path(__file__).parents[2]
PROSE = "".join(source.read_text() for source in sorted((ROOT / "rope_lm").glob("*.py")))
ODD = "naïve café, 東京は夜。\n\tÅngström's  ﬁne…\n\n  ▁ \u00a0 ½ x\x00y don't 12345678901234567890 \r\n" + "=" * 200
BYTES = st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.sampled_from([ODD.encode()]))


def piece_model(**options: object) -> bytes:
    """Return a SentencePiece model of PROSE with 500 pieces."""
    made = io.BytesIO()
    lines = iter(PROSE.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=made, vocab_size=500, minloglevel=2, **options
    )
    return made.getvalue()


@pytest.fixture(scope="module")
def coders() -> dict[str, tokenizer.Tokenizer]:
    return {
        "bytes": tokenizer.Bytes(),
        "bpe": tokenizer.BPE.train([PROSE.encode()], 600),
        "unigram": tokenizer.SentencePiece(piece_model(byte_fallback=True), "unigram"),
        "pairs": tokenizer.SentencePiece(piece_model(byte_fallback=True, model_type="bpe"), "pairs"),
    }


NAMES = ("bytes", "bpe", "unigram", "pairs")


@pytest.mark.parametrize("name", NAMES)
@given(content=BYTES)
def test_any_bytes_are_encoded_and_decoded_exactly(
    coders: dict[str, tokenizer.Tokenizer], name: str, content: bytes
) -> None:
    coder = coders[name]
    encoded = coder.encode(content)
    assert encoded.dtype == np.uint16 and encoded.ndim == 1 and (encoded < coder.separator).all()
    assert coder.vocabulary == coder.separator + 1
    assert coder.decode(np.append(encoded, coder.separator)) == content
    assert b"".join(coder.decode(np.array([token])) for token in encoded) == content, "token by token"


@pytest.mark.parametrize("name", NAMES[1:])
def test_text_like_the_training_text_has_fewer_tokens_than_bytes(
    coders: dict[str, tokenizer.Tokenizer], name: str
) -> None:
    assert len(coders[name].encode(PROSE.encode())) < 0.7 * len(PROSE)
    assert isinstance(coders[name], tokenizer.Tokenizer)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6))
def test_a_cut_between_blocks_cuts_no_token(coders: dict[str, tokenizer.Tokenizer], name: str, seed: int) -> None:
    """`blocks` relies on this at every place where it may cut."""
    words = random.Random(seed).choices(
        [*ODD.split(" "), "a", "", "\n", "x\n\n", "def f(self):\n    return 1", "é"], k=12
    )
    text = " ".join(words)
    whole = coders[name].encode(text.encode())
    for at in range(1, len(text)):
        if text[at] in " \n" and not text[at - 1].isspace():
            apart = [coders[name].encode(part.encode()) for part in (text[:at], text[at:])]
            np.testing.assert_array_equal(np.concatenate(apart), whole)


def test_the_pieces_of_a_document_change_no_token(coders: dict[str, tokenizer.Tokenizer]) -> None:
    text = (PROSE.encode() * (3 * BLOCK // len(PROSE) + 1))[: 3 * BLOCK]
    draw = random.Random(0)
    cuts = [0, *sorted(draw.choices(range(len(text)), k=40)), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    blocks = list(in_blocks(pieces))
    assert b"".join(blocks) == text and blocks == list(in_blocks([text])) and len(blocks) == 4
    assert max(map(len, blocks)) <= BLOCK
    encoded = np.concatenate([coders["bpe"].encode(block) for block in blocks])
    np.testing.assert_array_equal(encoded, coders["bpe"].encode(text))


@pytest.mark.parametrize("unit", [b"x", "é".encode(), "東京".encode(), b"\xff", b"\x80"])
def test_text_without_a_space_is_cut_between_letters(unit: bytes) -> None:
    text = b"." + unit * (2 * BLOCK // len(unit))
    blocks = list(in_blocks(text[at : at + 777_777] for at in range(0, len(text), 777_777)))
    assert b"".join(blocks) == text and max(map(len, blocks)) <= BLOCK
    if unit[0] not in (0xFF, 0x80):
        assert all(block.decode() for block in blocks)


def test_training_is_the_same_each_time_and_in_any_process(
    tmp_path: Path, text: Path, coders: dict[str, tokenizer.Tokenizer], make: Make
) -> None:
    again = tokenizer.BPE.train([PROSE.encode()], 600)
    assert again.fingerprint == coders["bpe"].fingerprint and again.model == coders["bpe"].model
    assert tokenizer.BPE.train([PROSE.encode()], 601).fingerprint != again.fingerprint
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_fingerprint, [(text, tmp_path)] * 3)
    assert len(set(found)) == 1
    made = [each for each in (tmp_path / "tokenizers").iterdir() if each.is_dir()]
    assert len(made) == 1, "one was trained, and no partial folder is left"
    meta = json.loads((made[0] / "meta.json").read_text())
    assert meta["bytes"] == make(f"text:{text}").tokens["train"] - 1
    assert meta["most"] == tokenizer.TRAINED and meta["fingerprint"] == found[0]


def _fingerprint(text: Path, cache: Path) -> str:
    return tokenizer.make("bpe:300", files.corpus(Request(f"text:{text}", 16, "", "", cache)), cache).fingerprint


def test_a_cached_tokenizer_is_used_and_a_damaged_one_trained_again(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _fingerprint(text, tmp_path)
    assert "training data.tokenizer=bpe:300" in capfd.readouterr().err
    assert _fingerprint(text, tmp_path) == before and capfd.readouterr().err == ""
    path = next(tmp_path.glob("tokenizers/*/tokenizer.json"))
    content = path.read_text()
    swapped = json.loads(content)
    swapped["model"]["merges"][:2] = reversed(swapped["model"]["merges"][:2])  # whole, and another tokenizer
    for spoiled in (content[:-100], json.dumps(swapped), ""):
        path.write_text(spoiled)
        assert _fingerprint(text, tmp_path) == before
        assert "not as it was written; made again" in capfd.readouterr().err
    assert path.read_text() == content


def test_training_reads_no_more_than_its_bound(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "TRAINED", 10_000)
    _fingerprint(text, tmp_path)
    meta = json.loads(next(tmp_path.glob("tokenizers/*/meta.json")).read_text())
    assert meta["bytes"] == meta["most"] == 10_000


def test_a_text_without_spaces_is_trained_on_in_seconds() -> None:
    """Pairs are merged within words, and every merge would pass over a word of 1 MiB."""
    letters = np.random.default_rng(0).integers(ord("a"), ord("e"), BLOCK, dtype=np.uint8).tobytes()
    train = "made = BPE.train([sys.stdin.buffer.read()], 2000); print(made.vocabulary, time.process_time())"
    code = f"import sys, time; from rope_lm.data.tokenizer import BPE; {train}"
    done = subprocess.run([sys.executable, "-c", code], input=letters, cwd=ROOT, capture_output=True)
    vocabulary, seconds = map(float, done.stdout.split())
    assert vocabulary == 2000 and seconds < 15, done.stderr


def test_bytes_per_token_count_the_bytes_of_the_text(text: Path, make: Make) -> None:
    made = {name: make(f"text:{text}", tokenizer=name) for name in ("bytes", "bpe:400")}
    size = {name: each.bytes_per_token * each.tokens["validation"] for name, each in made.items()}
    assert size["bytes"] == pytest.approx(size["bpe:400"])
    assert made["bpe:400"].bytes_per_token > 2 and made["bpe:400"].vocabulary == 400
    assert made["bytes"].fingerprint["text"] == made["bpe:400"].fingerprint["text"]
    assert made["bytes"].fingerprint["tokenizer"] != made["bpe:400"].fingerprint["tokenizer"]
    row = made["bpe:400"].validation[0]
    assert made["bpe:400"].coder.decode(row) in text.read_bytes()


@pytest.mark.parametrize("kind", ["bpe:300", "sentencepiece"])
def test_a_run_directory_carries_its_tokenizer(tmp_path: Path, text: Path, cache: str, kind: str) -> None:
    """A run is opened where its text, the cache and the model's file are missing."""
    (tmp_path / "my.model").write_bytes(piece_model(byte_fallback=True))
    name = f"sentencepiece:{tmp_path / 'my.model'}" if kind == "sentencepiece" else kind
    made = tokenizer.make(name, files.corpus(Request(f"text:{text}", 8, "", "", Path(cache))), Path(cache))
    (tmp_path / "my.model").unlink()
    made.save(tmp_path)
    coder = tokenizer.load(name, tmp_path, made.fingerprint)
    np.testing.assert_array_equal(coder.encode(ODD.encode()), made.encode(ODD.encode()))
    (file,) = tmp_path.glob("tokenizer.*")
    for content, words in [
        (tokenizer.BPE.train([PROSE.encode()], 300).model, "is not the one that it was trained with"),
        (piece_model(byte_fallback=True, model_type="char"), "is not the one that it was trained with"),
        (file.read_bytes()[:-100], "bring the file back"),
    ]:
        if content.startswith(b"{") == (kind == "bpe:300"):
            file.write_bytes(content)
            with pytest.raises(Refusal, match=rf"/tokenizer\.\w+ .*{words}"):
                tokenizer.load(name, tmp_path, made.fingerprint)
    file.unlink()
    with pytest.raises(Refusal, match=r"the run's tokenizer: .*/tokenizer\.\w+ cannot be read .*bring the file there"):
        tokenizer.load(name, tmp_path, made.fingerprint)


@pytest.mark.parametrize(
    "name, words",
    [
        ("byte", "unknown data.tokenizer 'byte': did you mean bytes"),
        ("bpe", "unknown data.tokenizer 'bpe': did you mean bpe:SIZE"),
        ("sentencepiece:", "unknown data.tokenizer 'sentencepiece:': did you mean sentencepiece:PATH"),
        ("bytes:1", "unknown data.tokenizer 'bytes:1'"),
        ("bpe:many", r"bpe:many: SIZE must be a whole number from 257 .*to 65535"),
        ("bpe:256", r"bpe:256: SIZE must be a whole number from 257 .*to 65535"),
        ("bpe:65536", "a vocabulary of 65,536 tokens is above 65,535"),
        ("bpe:30000", r"no pair of tokens occurs twice in this text after [\d,]+ tokens were made; .*bpe:\d+ at most"),
        ("sentencepiece:/none.model", "/none.model cannot be read .*bring the file there"),
        (
            "sentencepiece:~no-one/a.model",
            "tokenizer=sentencepiece:~no-one/a.model: there is no home folder ~no-one here",
        ),
        ("sentencepiece:TEXT", "is no SentencePiece model: give the .model file"),
        ("sentencepiece:EMPTY", "is no SentencePiece model: give the .model file"),
        ("sentencepiece:HUGE", "a vocabulary of 65,536 tokens is above 65,535"),
        (
            "sentencepiece:WORDS",
            r"WORDS gives .* back for b'a  b': every text must come back byte by byte; give a Sent",
        ),
        ("sentencepiece:SPACELESS", r"SPACELESS gives .* back for b'a  b': every text must come back"),
        ("sentencepiece:DAMAGED", r"DAMAGED is damaged \(.*byte piece <0xZZ> is invalid"),
        ("sentencepiece:CLOSED", r"has no piece for b'\\n' .*--byte_fallback=true"),
    ],
)
def test_a_mistake_is_refused_in_one_line(tmp_path: Path, text: Path, make: Make, name: str, words: str) -> None:
    files = {
        "TEXT": text.read_bytes,
        "EMPTY": bytes,
        "HUGE": _huge,
        "CLOSED": piece_model,
        "WORDS": lambda: piece_model(byte_fallback=True, model_type="word"),
        "SPACELESS": lambda: _renamed("▁", "QQ"),
        "DAMAGED": lambda: _renamed("<0x0A>", "<0xZZ>"),
    }
    kind, _, rest = name.partition(":")
    if rest in files:
        (tmp_path / rest).write_bytes(files[rest]())
        name = f"{kind}:{tmp_path / rest}"
    with pytest.raises(Refusal, match=words) as refused:
        make(f"text:{text}", tokenizer=name)
    assert "\n" not in str(refused.value)


def _huge() -> bytes:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    made = ModelProto()
    made.pieces.add(piece="<unk>", type=ModelProto.SentencePiece.UNKNOWN)
    for i in range(65_534):
        made.pieces.add(piece=f"piece{i}", score=-i)
    return made.SerializeToString()


def _renamed(piece: str, name: str) -> bytes:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    made = ModelProto.FromString(piece_model(byte_fallback=True))
    next(each for each in made.pieces if each.piece == piece).piece = name
    return made.SerializeToString()


def test_a_run_whose_tokenizer_changes_text_is_refused(tmp_path: Path, coders: dict[str, tokenizer.Tokenizer]) -> None:
    """The fingerprint is of what decides a token, and a normalizer added by hand is none of it."""
    coders["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(Refusal, match=r"tokenizer.json is damaged \(tokenizer.json gives b'na.* back for b'na.* CAF"):
        tokenizer.load("bpe:600", tmp_path, coders["bpe"].fingerprint)


def test_a_model_without_byte_fallback_names_the_missing_letter() -> None:
    coder = tokenizer.SentencePiece(piece_model(user_defined_symbols=["\n"]), "my.model")
    assert coder.decode(coder.encode(b"def  f(x):\n\n  return")) == b"def  f(x):\n\n  return"
    for text, letter in [("x 東", "東"), ("x \u2581", "\u2581")]:
        with pytest.raises(Refusal, match=f"my.model has no piece for .*'{letter}'.*--byte_fallback"):
            coder.encode(text.encode())
    with pytest.raises(Refusal, match=r"my.model has no piece for b'\\xff'"):
        coder.encode(b"x \xff")


def test_letters_match_the_package() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(tokenizer.byte_letters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é\x00 \n")
    assert shown[0][0] == "".join(tokenizer.byte_letters()[byte] for byte in "é\x00 \n".encode())
