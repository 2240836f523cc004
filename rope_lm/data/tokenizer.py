"""Text to tokens and back without loss: for every tokenizer, decode(encode(text)) == text, byte for byte.

Otherwise bits per byte, the unit in which tokenizers are compared, would refer to different bytes.
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
from jaxtyping import Integer, UInt16

from rope_lm import settings
from rope_lm.data import cache
from rope_lm.data.documents import Corpus, blocks, escaped
from rope_lm.refusal import Refusal, unknown

# A text that tokenizers are known to change.
ODD = "naïve CAFÉ,  東京は夜。 ﬁne… ▁ \u00a0 e\u0301 ½ \u200b\ufeff x\x00y 12345 \r\n <s></s><unk><0x0A>"
LARGEST = 65_535  # vocabulary: tokens are kept as uint16
TRAINED = 64 * 2**20  # bytes at the beginning of the training text that a BPE is trained on


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a tokenizer. Tokenizers that encode any text differently have different fingerprints."""

    vocabulary: int
    separator: int  # ends each document
    fingerprint: str

    def encode(self, text: bytes) -> UInt16[np.ndarray, "tokens"]: ...

    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> bytes:
        """Return the text, without separators."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's file, if it has one, so that tokens can be decoded on another machine."""


class Bytes:
    """One token per byte, and 256 as the separator. Nothing to train, and any text can be encoded."""

    vocabulary = 257
    separator = 256
    fingerprint = "bytes-1"

    def encode(self, text: bytes) -> UInt16[np.ndarray, "tokens"]:
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> bytes:
        """Return the text, without separators."""
        return tokens[tokens != self.separator].astype(np.uint8).tobytes()

    def save(self, folder: Path) -> None:
        """Do nothing: there is no file."""


class _Subwords:
    """The common part of BPE and SentencePiece: a model file, and one token for each of its pieces of text.

    The separator is one more token. Bytes that are not UTF-8, and letters in APART, are encoded byte by byte.
    """

    FILE: str  # its name in a run directory
    _coder: Any  # of the package that trained the model
    APART = "\udc80-\udcff"  # "surrogateescape" decodes bytes that are not UTF-8 to these

    def __init__(self, model: bytes, pieces: list[bytes], token_of_byte: dict[int, int]):
        self.model, self._pieces, self._token_of_byte = model, pieces, token_of_byte
        self.separator, self.vocabulary = len(pieces), len(pieces) + 1

    def encode(self, text: bytes) -> UInt16[np.ndarray, "tokens"]:
        parts = re.split(f"([{self.APART}])", text.decode("utf-8", "surrogateescape"))
        apart = (self._bytes(letter) for letter in parts[1::2])
        pairs: Any = itertools.zip_longest(self._encode(parts[::2]), apart, fillvalue=[])
        return np.concatenate([np.array(tokens, np.uint16) for pair in pairs for tokens in pair])

    def decode(self, tokens: Integer[np.ndarray, "tokens"]) -> bytes:
        """Return the text, without separators."""
        return b"".join(self._pieces[token] for token in tokens.tolist() if token != self.separator)

    def save(self, folder: Path) -> None:
        """Write the model to FILE in a run directory."""
        partial = folder / f"{self.FILE}.partial"
        partial.write_bytes(self.model)
        os.replace(partial, folder / self.FILE)

    def _check(self, given: str) -> None:
        """Raise Refusal, naming the `given` model, if a text does not survive: odd ones, all bytes, all pieces."""
        for text in (b"a  b", b" \n\n\tc\r\n", ODD.encode(), bytes(range(256)), b" ".join(self._pieces)):
            try:
                back = self.decode(self.encode(text))
            except Refusal:  # a model without a token for some bytes refuses the texts that hold them
                continue
            if back != text:
                raise Refusal(
                    f"{given} gives {back[:40]!r} back for {text[:40]!r}: every text must come back byte by byte; give "
                    "a SentencePiece model of type unigram, bpe or char, or data.tokenizer=bpe:SIZE"
                )

    def _encode(self, texts: list[str]) -> Iterable[list[int]]:
        raise NotImplementedError

    def _bytes(self, letter: str) -> list[int]:
        return [self._token_of_byte[byte] for byte in escaped(letter)]


class BPE(_Subwords):
    """Byte-level byte pair encoding (Sennrich et al., arXiv 1508.07909; over bytes: Radford et al., GPT-2, 2019).

    All 256 bytes are tokens, so that any text can be encoded.
    """

    FILE = "tokenizer.json"
    # Text is cut into words first, and pairs are merged within a word. This is GPT-2's pattern with a bound on every
    # repetition: a text without spaces would be one word that takes hours to train on. A word begins wherever white
    # space follows something else, and `blocks` relies on that.
    WORDS = (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,64}| ?\p{N}{1,64}| ?[^\s\p{L}\p{N}]{1,64}"
        r"|\s{1,64}(?!\S)|\s{1,64}"
    )

    def __init__(self, model: bytes):
        """Read the content of a tokenizer.json, Hugging Face's own format."""
        import tokenizers

        self._coder = tokenizers.Tokenizer.from_str(model.decode())
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        size = self._coder.get_vocab_size()
        pieces = [bytes(byte_of[letter] for letter in self._coder.id_to_token(token)) for token in range(size)]
        super().__init__(model, pieces, {piece[0]: token for token, piece in enumerate(pieces) if len(piece) == 1})
        # Only what decides a token: another version of the package may write the rest of the file differently.
        content = json.loads(model)
        words, *_ = content["pre_tokenizer"]["pretokenizers"]
        decides = [words["pattern"], [self._token_of_byte[byte] for byte in range(256)], content["model"]["merges"]]
        self.fingerprint = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
        self._check(self.FILE)

    @classmethod
    def train(cls, text: Iterable[bytes], size: int) -> "BPE":
        """Merge the most frequent pairs of `text` until there are `size` tokens. The result is deterministic.

        Raises Refusal if too few pairs occur twice.
        """
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        coder = Tokenizer(models.BPE())
        words = pre_tokenizers.Split(Regex(cls.WORDS), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        coder.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1, min_frequency=2, initial_alphabet=byte_letters(), show_progress=False
        )
        coder.train_from_iterator((block.decode("utf-8", "ignore") for block in text), trainer)
        trained = cls(coder.to_str().encode())
        if trained.vocabulary < size:
            raise Refusal(
                f"data.tokenizer=bpe:{size}: no pair of tokens occurs twice in this text after {trained.vocabulary:,} "
                f"tokens were made; give more text, or bpe:{trained.vocabulary} at most"
            )
        return trained

    def _encode(self, texts: list[str]) -> Iterable[list[int]]:
        return (encoding.ids for encoding in self._coder.encode_batch_fast(texts))


class SentencePiece(_Subwords):
    """A model trained with SentencePiece (Kudo and Richardson, arXiv 1808.06226).

    A model may change text before it encodes it: Unicode normalization, runs of spaces merged, a space put in front.
    That is switched off, because bits per byte would then refer to the changed text. Text without a piece is encoded as
    bytes, if the model was trained with byte_fallback.
    """

    FILE = "tokenizer.model"
    SPACE = "▁"  # SentencePiece's sign for a space; where a text holds the sign itself, it is encoded as bytes
    APART = _Subwords.APART + SPACE

    def __init__(self, model: bytes, name: str):
        """Read the content of a .model file, called `name` in errors. Raises Refusal if it is not a model."""
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # a generated module

        try:
            content = ModelProto.FromString(model)
        except DecodeError:
            content = ModelProto()
        if not content.pieces:
            raise Refusal(f"{name} is no SentencePiece model: give the .model file that its training wrote")
        _check_size(name, len(content.pieces) + 1)
        content.normalizer_spec.name, content.normalizer_spec.precompiled_charsmap = "identity", b""
        content.normalizer_spec.add_dummy_prefix = content.normalizer_spec.remove_extra_whitespaces = False
        try:
            self._coder = SentencePieceProcessor(model_proto=content.SerializeToString())
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise Refusal(f"{name} is damaged ({reason}): give the .model file that its training wrote") from error
        kind = ModelProto.SentencePiece
        pieces, token_of_byte = [], {}
        for token, piece in enumerate(content.pieces):
            if piece.type == kind.BYTE:  # <0x0A>
                byte = int(piece.piece[3:5], 16)
                token_of_byte[byte] = token
                pieces.append(bytes([byte]))
            else:
                hidden = piece.type in (kind.CONTROL, kind.UNKNOWN)
                pieces.append(b"" if hidden else piece.piece.replace(self.SPACE, " ").encode())
        super().__init__(model, pieces, token_of_byte)
        self.name, self.fingerprint = name, hashlib.sha256(model).hexdigest()
        self._check(name)

    def _encode(self, texts: list[str]) -> Iterable[list[int]]:
        for text in texts:
            # Line by line: scores are summed in float32, and over a long text their rounding would decide.
            encoded = [token for line in self._coder.encode(re.split(r"(?<=\S)(?=\n)", text)) for token in line]
            if self._coder.unk_id() in encoded:
                lacking = (letter for letter in text if self._coder.unk_id() in self._coder.encode(letter))
                raise self._lacks(next(lacking, text[:1]))
            yield encoded

    def _bytes(self, letter: str) -> list[int]:
        if not self._token_of_byte:
            raise self._lacks(letter)
        return super()._bytes(letter)

    def _lacks(self, letter: str) -> Refusal:
        return Refusal(
            f"{self.name} has no piece for {escaped(letter)!r} ({letter!r}), which is in the text: give a model "
            "trained with --byte_fallback=true, or data.tokenizer=bpe:SIZE"
        )


FORMS = {"bytes": "bytes", "bpe": "bpe:SIZE", "sentencepiece": "sentencepiece:PATH"}  # of `data.tokenizer`


def check(name: str) -> None:
    """Raise Refusal if `data.tokenizer` names no tokenizer. Needs neither text nor files."""
    kind, colon, argument = name.partition(":")
    if kind not in FORMS or bool(colon and argument) != (":" in FORMS[kind]) or name == f"{kind}:":
        raise unknown("data.tokenizer", name, FORMS.values())
    if kind == "bpe":
        if not argument.isdecimal() or int(argument) < Bytes.vocabulary:
            raise Refusal(
                f"data.tokenizer={name}: SIZE must be a whole number from {Bytes.vocabulary} (256 bytes and the "
                f"separator) to {LARGEST}"
            )
        _check_size(f"data.tokenizer={name}", int(argument))


def make(name: str, corpus: Corpus, root: Path) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names.

    It is `bytes`; `bpe:SIZE`, with SIZE tokens, trained once on the training text of `corpus` and kept in the cache at
    `root`; or `sentencepiece:PATH`, a .model file. Raises Refusal for a name, a size or a file that cannot be used.
    """
    check(name)
    kind, _, argument = name.partition(":")
    if kind == "bytes":
        return Bytes()
    if kind == "bpe":
        return _trained(corpus, int(argument), root)
    given = f"data.tokenizer={name}"
    return SentencePiece(_read(settings.path(argument, given), given), given)


def load(name: str, folder: Path, fingerprint: str) -> Tokenizer:
    """Return the tokenizer `name` from the file that its `save` wrote into a run directory, `folder`.

    Raises Refusal if the file is missing, or has another fingerprint.
    """
    check(name)
    kind = name.partition(":")[0]
    if kind == "bytes":
        return Bytes()
    path = folder / (BPE.FILE if kind == "bpe" else SentencePiece.FILE)
    content = _read(path, "the run's tokenizer")
    try:
        coder = BPE(content) if kind == "bpe" else SentencePiece(content, str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise Refusal(f"the run's tokenizer: {path} is damaged ({error}): bring the file back") from error
    if coder.fingerprint != fingerprint:
        raise Refusal(f"the run's tokenizer: {path} is not the one that it was trained with: bring the file back")
    return coder


def byte_letters() -> list[str]:
    """Return a letter for every byte, as GPT-2 and Hugging Face do: itself if it is visible, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _check_size(given: str, vocabulary: int) -> None:
    if vocabulary > LARGEST:
        raise Refusal(
            f"{given}: a vocabulary of {vocabulary:,} tokens is above {LARGEST:,}, the most for tokens of 16 bits"
        )


def _read(path: Path, given: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refusal(f"{given}: {path} cannot be read ({error.strerror}): bring the file there") from error


def _trained(corpus: Corpus, size: int, root: Path) -> BPE:
    """Return a BPE trained on a corpus, from the cache at `root` or newly trained."""
    import tokenizers

    key = {"text": corpus.fingerprint, "size": size, "most": TRAINED, "words": BPE.WORDS, "by": tokenizers.__version__}
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]

    def build(folder: Path) -> None:
        counted = 0

        def beginning() -> Iterator[bytes]:
            nonlocal counted
            for block in itertools.chain.from_iterable(map(blocks, corpus.documents("train"))):
                block = block[: TRAINED - counted]
                counted += len(block)
                yield block
                if counted == TRAINED:
                    return

        print(f"training data.tokenizer=bpe:{size}", file=sys.stderr)
        coder = BPE.train(beginning(), size)
        coder.save(folder)
        meta = {**key, "bytes": counted, "fingerprint": coder.fingerprint}
        (folder / "meta.json").write_text(json.dumps(meta, indent=2))

    folder = cache.prepare(root, f"tokenizers/{name}", _intact, build)
    return BPE((folder / BPE.FILE).read_bytes())


def _intact(folder: Path) -> bool:
    """Return True if the tokenizer matches meta.json, which is written last."""
    try:
        fingerprint = json.loads((folder / "meta.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    try:
        if BPE((folder / BPE.FILE).read_bytes()).fingerprint == fingerprint:
            return True
    except Exception:  # tokenizers raises nothing narrower
        pass
    print(f"{folder / BPE.FILE}: not as it was written; made again", file=sys.stderr)
    return False
