"""Probes, `data=probe:NAME`: tasks that need position. Their rows are generated as they are read.

A row is readable ASCII text, one token per character. Some of its tokens, the answers, repeat an earlier token of the
row at a known distance. The rest is random or fixed.

    copy        abcd|abcd;xyz|xyz;   a random string, a separator, the string again
    reverse     abcd|dcba;xyz|zyx;   the string backwards
    induction   QaWcQaEfWc           the letter that followed a capital follows it again (Olsson et al., arXiv
                                     2209.11895)
    passkey     the<71903>ss?71903   a key hidden at any depth of filler, asked for at the end (Mohtashami and Jaggi,
                                     arXiv 2305.16300)
"""

import hashlib
import string
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from rope_lm.data.documents import SPLITS, Request
from rope_lm.refusal import Refusal, unknown

ROWS = {"train": 2**24, "validation": 2**14, "test": 2**14}
CAPITALS, LETTERS, DIGITS = (
    np.frombuffer(symbols.encode(), np.uint8)
    for symbols in (string.ascii_uppercase, string.ascii_lowercase, string.digits)
)
FILLER = np.frombuffer(
    b"the grass is green. the sky is blue. the sun is yellow. here we go. there and back. ", np.uint8
)
KEY = 8  # digits of a passkey


class Row(NamedTuple):
    """A row of T + 1 tokens and its answers: the place of each, and the earlier place of the token that it repeats."""

    tokens: UInt8[np.ndarray, "W"]
    at: Int[np.ndarray, "answers"]
    source: Int[np.ndarray, "answers"]


class Answers(NamedTuple):
    """The targets of a row that are answers, and their distance from the token that they repeat (else 0)."""

    mask: Bool[np.ndarray, "T"]
    distance: Int32[np.ndarray, "T"]


class Probe:
    """The rows of one split of a probe, by number.

    A row depends on the probe's name, the split, its number and `length`. Raises Refusal for an unknown probe, and for
    rows that are too short for it.
    """

    def __init__(self, name: str, length: int, split: str):
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
        self.name, self.length, self.split = name, length, split
        self.task = PROBES[name]
        if length < self.task.shortest:
            raise Refusal(
                f"data.length={length}: probe:{name} needs rows of at least {self.task.shortest} tokens, raise it"
            )

    def __len__(self) -> int:
        return ROWS[self.split]

    def __getitem__(self, numbers: Int[np.ndarray, "R"]) -> Int32[np.ndarray, "R W"]:
        return np.stack([self._row(number).tokens for number in numbers.tolist()]).astype(np.int32)

    def answers(self, row: int) -> Answers:
        """Return which targets (tokens 1 to `length` of the row) are answers, and at which distance."""
        _, at, source = self._row(row)
        mask, distance = np.zeros(self.length, bool), np.zeros(self.length, np.int32)
        mask[at - 1], distance[at - 1] = True, at - source
        return Answers(mask, distance)

    def _row(self, row: int) -> Row:
        key = int.from_bytes(hashlib.sha256(f"{self.name} {self.split} {row}".encode()).digest()[:16])
        # Philox's raw numbers are the same in every version of numpy; those of its distributions may not be.
        bits = np.random.Philox(key=key)
        return self.task.draw(self.length + 1, lambda count, below: bits.random_raw(count) % np.uint64(below))


def splits(request: Request) -> dict[str, Probe]:
    """Return the rows of a probe by split."""
    return {split: Probe(request.argument, request.length, split) for split in SPLITS}


def fingerprint(probes: Iterable[Probe]) -> str:
    """Return the sha256 of everything that the rows depend on and of the first rows themselves."""
    digest = hashlib.sha256()
    for rows in probes:
        digest.update(f"{rows.name} {rows.split} {rows.length} {len(rows)}".encode())
        digest.update(rows[np.arange(16)].astype("<i4").tobytes())
    return digest.hexdigest()


Draw = Callable[[int, int], np.ndarray]  # count, bound -> `count` random whole numbers below `bound`


def _repeated(size: int, draw: Draw, backwards: bool) -> Row:
    """Fill the row with pairs of a random string, of any length that there is room for, and its copy."""
    tokens, at, source = np.full(size, ord(";"), np.uint8), [], []
    start = 0
    while (room := (size - start - 2) // 2) > 0:
        count = 1 + int(draw(1, room)[0])
        original = np.arange(start, start + count)
        tokens[original] = LETTERS[draw(count, len(LETTERS))]
        tokens[start + count] = ord("|")
        at.append(original + count + 1)
        source.append(original[::-1] if backwards else original)
        tokens[at[-1]] = tokens[source[-1]]
        start += 2 * count + 2
    return Row(tokens, np.concatenate(at), np.concatenate(source))


def _induction(size: int, draw: Draw) -> Row:
    pairs = size // 2 + 1
    # The smaller of two draws: some capitals return soon and often, others after a long time.
    key = np.minimum(draw(pairs, len(CAPITALS)), draw(pairs, len(CAPITALS)))
    value = draw(len(CAPITALS), len(LETTERS))
    tokens = np.stack([CAPITALS[key], LETTERS[value[key]]], 1).reshape(-1)[:size]
    last: dict[int, int] = {}
    at, source = [], []
    for pair, capital in enumerate(key.tolist()):
        if capital in last and 2 * pair + 1 < size:
            at.append(2 * pair + 1)
            source.append(2 * last[capital] + 1)
        last[capital] = pair
    return Row(tokens, np.array(at, int), np.array(source, int))


def _passkey(size: int, draw: Draw) -> Row:
    tokens = np.resize(FILLER, size)
    key = DIGITS[draw(KEY, len(DIGITS))]
    start = int(draw(1, size - 2 * KEY - 3 + 1)[0])
    tokens[start], tokens[start + KEY + 1] = ord("<"), ord(">")
    tokens[-KEY - 1] = ord("?")
    source, at = np.arange(start + 1, start + KEY + 1), np.arange(size - KEY, size)
    tokens[source] = tokens[at] = key
    return Row(tokens, at, source)


class Task(NamedTuple):
    """A kind of probe."""

    draw: Callable[[int, Draw], Row]  # tokens of the row, random numbers -> row
    shortest: int  # allowed data.length
    choices: int  # symbols that an answer can be: the chance of a right guess is 1 / choices


PROBES = {
    "copy": Task(partial(_repeated, backwards=False), 16, len(LETTERS)),
    "reverse": Task(partial(_repeated, backwards=True), 16, len(LETTERS)),
    "induction": Task(_induction, 16, len(LETTERS)),
    "passkey": Task(_passkey, 32, len(DIGITS)),
}
