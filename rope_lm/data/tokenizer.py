"""Text to tokens and back, exactly: for every tokenizer decode(encode(text)) is text, byte by byte.

Only so are bits per byte, in which tokenizers are compared, of the same bytes.
"""

import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rope_lm import settings
from rope_lm.data import cache
from rope_lm.data.corpora import Corpus
from rope_lm.refusal import Refusal, unknown

LARGEST = 65_535  # vocabulary: tokens are kept as uint16
BLOCK = 2**20  # bytes of a document that are encoded at once
TRAINED = 64 * 2**20  # bytes of the training text, its first ones, that a BPE is trained on at most


@runtime_checkable
class Tokenizer(Protocol):
    """What a tokenizer is. `fingerprint` changes when any token would."""

    vocabulary: int
    separator: int  # stands after each document
    fingerprint: str

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> bytes: ...

    def save(self, folder: Path) -> None: ...


class Bytes:
    """Every byte is a token, 256 is the separator: nothing to train, no text that cannot be encoded."""

    vocabulary = 257
    separator = 256
    fingerprint = "bytes-1"

    def encode(self, text: bytes) -> np.ndarray:
        """uint16 [len(text)]."""
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def decode(self, tokens: np.ndarray) -> bytes:
        """The bytes; separators are left out."""
        tokens = np.asarray(tokens)
        return tokens[tokens != self.separator].astype(np.uint8).tobytes()

    def save(self, folder: Path) -> None:
        """There is nothing to keep."""


class BPE:
    """Byte-level byte pair encoding (Sennrich et al., arXiv 1508.07909; over bytes: Radford et al., GPT-2, 2019).

    All 256 bytes are tokens, and bytes that are no UTF-8 stay tokens of their own: any text can be encoded. The last
    token is the separator.
    """

    FILE = "tokenizer.json"
    # Text is cut into words first, and pairs are merged within a word: GPT-2's pattern, with an end to every
    # repetition, or a text without spaces would be one word that takes hours to train on. A word begins wherever white
    # space follows something else, which `blocks` counts on.
    WORDS = (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,64}| ?\p{N}{1,64}| ?[^\s\p{L}\p{N}]{1,64}"
        r"|\s{1,64}(?!\S)|\s{1,64}"
    )

    def __init__(self, model: str):
        """From the text of a tokenizer.json, Hugging Face's own format."""
        import tokenizers

        self.model, self._coder = model, tokenizers.Tokenizer.from_str(model)
        self.separator = self._coder.get_vocab_size()
        self.vocabulary = self.separator + 1
        byte_of = {letter: byte for byte, letter in enumerate(_letters())}
        self._bytes = [
            bytes(byte_of[letter] for letter in self._coder.id_to_token(token)) for token in range(self.separator)
        ]
        self._of_byte = {piece[0]: token for token, piece in enumerate(self._bytes) if len(piece) == 1}
        known = json.loads(model)  # of which only what decides a token: another version may write the rest otherwise
        words, *_ = known["pre_tokenizer"]["pretokenizers"]
        decides = [words["pattern"], [self._of_byte[byte] for byte in range(256)], known["model"]["merges"]]
        self.fingerprint = hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    @classmethod
    def train(cls, text: Iterable[bytes], size: int) -> "BPE":
        """Merges the most frequent pairs of `text` until there are `size` tokens; the same for the same text.

        Raises Refusal where no pair occurs twice before.
        """
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        coder = Tokenizer(models.BPE())
        words = pre_tokenizers.Split(Regex(cls.WORDS), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        coder.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1, min_frequency=2, initial_alphabet=_letters(), show_progress=False
        )
        coder.train_from_iterator((block.decode("utf-8", "ignore") for block in text), trainer)
        made = cls(coder.to_str())
        if made.vocabulary < size:
            raise Refusal(
                f"data.tokenizer=bpe:{size}: no pair of tokens occurs twice in this text after {made.vocabulary:,} "
                f"tokens were made; give more text, or bpe:{made.vocabulary} at most"
            )
        return made

    def encode(self, text: bytes) -> np.ndarray:
        """uint16 [tokens]."""
        parts = _parts(text, _NO_UTF8)
        encoded = (each.ids for each in self._coder.encode_batch_fast(parts[::2]))
        return _joined(encoded, ([self._of_byte[_byte(letter)]] for letter in parts[1::2]))

    def decode(self, tokens: np.ndarray) -> bytes:
        """The bytes; separators are left out."""
        return b"".join(self._bytes[token] for token in np.asarray(tokens).tolist() if token != self.separator)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, so that the tokens can be read where the text is not."""
        _write(folder / self.FILE, self.model.encode())


class SentencePiece:
    """A model made with SentencePiece (Kudo and Richardson, arXiv 1808.06226), from its file.

    Text goes in as it is: what a model does to it first (Unicode normalization, several spaces made one, a space put
    before it) is switched off, for bits per byte would be of another text. What has no piece becomes bytes, where the
    model was trained with byte_fallback. The separator is a token more.
    """

    FILE = "tokenizer.model"

    def __init__(self, model: bytes, name: str):
        """From the content of a .model file; mistakes are said of `name`. Raises Refusal for what is no model."""
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        self.model, self.name = model, name
        try:
            known = ModelProto.FromString(model)
        except DecodeError:
            known = ModelProto()
        if not known.pieces:
            raise Refusal(f"{name} is no SentencePiece model: give the .model file that its training wrote")
        self.separator = len(known.pieces)
        self.vocabulary = self.separator + 1
        _check_size(name, self.vocabulary)
        self.fingerprint = hashlib.sha256(model).hexdigest()
        known.normalizer_spec.name, known.normalizer_spec.precompiled_charsmap = "identity", b""
        known.normalizer_spec.add_dummy_prefix = known.normalizer_spec.remove_extra_whitespaces = False
        self._coder = SentencePieceProcessor(model_proto=known.SerializeToString())
        kind = ModelProto.SentencePiece
        hidden = (kind.CONTROL, kind.UNKNOWN)
        self._bytes, self._of_byte = [], {}
        for token, piece in enumerate(known.pieces):
            if piece.type == kind.BYTE:  # <0x0A>
                self._of_byte[int(piece.piece[3:5], 16)] = token
                self._bytes.append(bytes([int(piece.piece[3:5], 16)]))
            else:
                self._bytes.append(b"" if piece.type in hidden else piece.piece.replace(_SPACE, " ").encode())

    def encode(self, text: bytes) -> np.ndarray:
        """uint16 [tokens]. Raises Refusal for a letter that has no piece, in a model without byte_fallback."""
        parts = _parts(text, _NO_UTF8 + _SPACE)
        return _joined(map(self._encode, parts[::2]), map(self._as_bytes, parts[1::2]))

    def _encode(self, text: str) -> list[int]:
        # Line by line: scores are summed in float32, and over a long text their rounding would decide.
        encoded = [token for line in self._coder.encode(_LINES.split(text)) for token in line]
        if self._coder.unk_id() in encoded:
            unknown_ones = (letter for letter in text if self._coder.unk_id() in self._coder.encode(letter))
            self._refuse(next(unknown_ones, text[:1]))
        return encoded

    def decode(self, tokens: np.ndarray) -> bytes:
        """The bytes; separators are left out."""
        return b"".join(self._bytes[token] for token in np.asarray(tokens).tolist() if token != self.separator)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.model, so that the tokens can be read where the model's file is not."""
        _write(folder / self.FILE, self.model)

    def _as_bytes(self, letter: str) -> list[int]:
        if not self._of_byte:
            self._refuse(letter)
        return [self._of_byte[byte] for byte in letter.encode("utf-8", "surrogateescape")]

    def _refuse(self, letter: str) -> None:
        raise Refusal(
            f"{self.name} has no piece for {letter.encode('utf-8', 'surrogateescape')!r} ({letter!r}), which is in the "
            "text: give a model trained with --byte_fallback=true, or data.tokenizer=bpe:SIZE"
        )


KINDS = ("bytes", "bpe:SIZE", "sentencepiece:PATH")


def check(name: str) -> None:
    """Raises Refusal for a `data.tokenizer` that names none, before any text is prepared."""
    kind, _, rest = name.partition(":")
    if kind == "bpe" and rest:
        if not rest.isdecimal() or int(rest) < Bytes.vocabulary:
            raise Refusal(
                f"data.tokenizer={name}: SIZE must be a whole number from {Bytes.vocabulary} (256 bytes and the "
                f"separator) to {LARGEST}"
            )
        _check_size(f"data.tokenizer={name}", int(rest))
    elif not (name == "bytes" or (kind == "sentencepiece" and rest)):
        raise unknown("data.tokenizer", name, KINDS)


def make(name: str, corpus: Corpus, root: Path) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: bytes, bpe:SIZE (SIZE tokens in all, trained on the training text of
    `corpus` once and kept in the cache at `root`) or sentencepiece:PATH (a .model file).

    Raises Refusal for a name, a size or a file that cannot be used.
    """
    check(name)
    kind, _, rest = name.partition(":")
    if kind == "bytes":
        return Bytes()
    if kind == "bpe":
        return _trained(corpus, int(rest), root)
    given = f"data.tokenizer={name}"
    return SentencePiece(_read(settings.path(rest, given), given), given)


def load(name: str, folder: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer `name` as its `save` wrote it into `folder`, a run's.

    Raises Refusal where its file is not there, or is not the one with this fingerprint.
    """
    check(name)
    kind = name.partition(":")[0]
    if kind == "bytes":
        return Bytes()
    path = folder / (BPE.FILE if kind == "bpe" else SentencePiece.FILE)
    content = _read(path, "the run's tokenizer")
    try:
        made = BPE(content.decode()) if kind == "bpe" else SentencePiece(content, str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise Refusal(f"the run's tokenizer: {path} is damaged ({error}): bring the file back") from error
    if made.fingerprint != fingerprint:
        raise Refusal(f"the run's tokenizer: {path} is not the one that it was trained with: bring the file back")
    return made


def blocks(document: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of a document in blocks of at most 1 MiB, cut where its bytes say, wherever its pieces end.

    A cut stands before a space or the end of a line that follows something else, where every tokenizer here begins a
    token anyway: the tokens are those of the whole document. (Text that has no such place in a MiB is cut between two
    letters; so may be the tokens there, the same ones each time. So is what a SentencePiece model's pieces hold beyond
    a space, if it was trained to let them.)
    """
    held = b""
    for piece in document:
        held += piece
        at = 0
        while len(held) - at > BLOCK:
            size = _cut(held[at : at + BLOCK + 1])
            yield held[at : at + size]
            at += size
        held = held[at:]
    if held:
        yield held


def _cut(text: bytes) -> int:
    """Where to cut text of BLOCK + 1 bytes: as late as it can be, and at BLOCK at the latest."""
    if found := _BEFORE_SPACE.match(text.decode("utf-8", "surrogateescape")):
        return len(found[0].encode("utf-8", "surrogateescape"))
    return next((at for at in range(BLOCK, BLOCK - 4, -1) if text[at] & 0xC0 != 0x80), BLOCK)


_BEFORE_SPACE = re.compile(r".*\S(?=[ \n])", re.DOTALL)
_LINES = re.compile(r"(?<=\S)(?=\n)")
_NO_UTF8 = "\udc80-\udcff"  # what "surrogateescape" makes of such bytes
_SPACE = "▁"  # what SentencePiece writes for a space: a text's own is encoded as bytes


def _parts(text: bytes, apart: str) -> list[str]:
    """The text's letters; every second part is one of those to be set apart."""
    return re.split(f"([{apart}])", text.decode("utf-8", "surrogateescape"))


def _byte(letter: str) -> int:
    return letter.encode("utf-8", "surrogateescape")[0]


def _joined(parts: Iterable[list[int]], between: Iterable[list[int]]) -> np.ndarray:
    both = itertools.zip_longest(parts, between, fillvalue=[])
    return np.concatenate([np.array(tokens, np.uint16) for pair in both for tokens in pair])


def _letters() -> list[str]:
    """A letter for every byte, as GPT-2 and Hugging Face write them: itself where it can be seen, else one from 256."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def _check_size(what: str, vocabulary: int) -> None:
    if vocabulary > LARGEST:
        raise Refusal(
            f"{what}: a vocabulary of {vocabulary:,} tokens is above {LARGEST:,}, the most that fits a token of 16 bits"
        )


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refusal(f"{what}: {path} cannot be read ({error.strerror}): bring the file there") from error


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


# --- a BPE of a corpus, made once ------------------------------------------------------------------------------------


def _trained(corpus: Corpus, size: int, root: Path) -> BPE:
    import tokenizers

    key = {"text": corpus.fingerprint, "size": size, "most": TRAINED, "words": BPE.WORDS, "by": tokenizers.__version__}
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]

    def build(folder: Path) -> None:
        counted = 0

        def text() -> Iterator[bytes]:
            nonlocal counted
            for document in corpus.documents("train"):
                for block in blocks(document):
                    block = block[: TRAINED - counted]
                    counted += len(block)
                    yield block
                    if counted == TRAINED:
                        return

        print(f"training data.tokenizer=bpe:{size}", file=sys.stderr)
        made = BPE.train(text(), size)
        made.save(folder)
        meta = {**key, "bytes": counted, "fingerprint": made.fingerprint}
        (folder / "meta.json").write_text(json.dumps(meta, indent=2))

    folder = cache.prepare(root, f"tokenizers/{name}", _whole, build)
    return BPE((folder / BPE.FILE).read_text())


def _whole(folder: Path) -> bool:
    """Whether the tokenizer is there and is what meta.json, written last, says that it is."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return False
    try:
        whole = BPE((folder / BPE.FILE).read_text()).fingerprint == meta["fingerprint"]
    except Exception:  # tokenizers raises nothing narrower
        whole = False
    if not whole:
        print(f"{folder / BPE.FILE}: not as it was written; made again", file=sys.stderr)
    return whole
