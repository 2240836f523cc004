"""Probes: tasks that need position, made up row by row as they are read, through the same path as text.

A row is readable text of ASCII letters, each a token. Some of its tokens, the answers, follow from what stands before
them, a known number of tokens back; the rest is drawn at random, or given.

    copy        abcd|abcd;xyz|xyz;   a random string, a separator, the string again
    reverse     abcd|dcba;xyz|zyx;   the string backwards
    induction   QaWcQaEfWc           what followed a capital follows it again (Olsson et al., arXiv 2209.11895)
    passkey     the<71903>ss?71903   a key at any depth of filler, asked for at the end (Mohtashami and Jaggi, arXiv
                                     2305.16300)
"""

import hashlib
import string
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from rope_lm.refusal import Refusal, unknown

ROWS = {"train": 2**24, "validation": 2**14, "test": 2**14}
CAPITALS, LETTERS, DIGITS = (
    np.frombuffer(each.encode(), np.uint8) for each in (string.ascii_uppercase, string.ascii_lowercase, string.digits)
)
FILLER = np.frombuffer(
    b"the grass is green. the sky is blue. the sun is yellow. here we go. there and back. ", np.uint8
)
KEY = 8  # digits of a passkey


class Row(NamedTuple):
    """A row of T + 1 tokens, and its answers: for each a place in it and the place, before it, where it stands."""

    tokens: np.ndarray  # uint8 [T + 1]
    at: np.ndarray  # int [answers]
    source: np.ndarray  # int [answers]


class Answers(NamedTuple):
    """Which of a row's T targets are answers, and how many tokens before itself each stands (0 where it is none)."""

    mask: np.ndarray  # bool [T]
    distance: np.ndarray  # int32 [T]


class Probe:
    """The rows of one split of a probe, by number.

    A row hangs on the probe's name, the split (train, validation or test), its number and `length`. Raises Refusal
    for an unknown probe, and for rows that are too short for it.
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

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """int [B] -> int32 [B length + 1]."""
        return np.stack([self._row(row).tokens for row in numbers.tolist()]).astype(np.int32)

    def answers(self, row: int) -> Answers:
        """Which targets (tokens 1 to `length` of the row) are answers, and at which distance."""
        _, at, source = self._row(row)
        mask, distance = np.zeros(self.length, bool), np.zeros(self.length, np.int32)
        mask[at - 1], distance[at - 1] = True, at - source
        return Answers(mask, distance)

    def _row(self, row: int) -> Row:
        key = int.from_bytes(hashlib.sha256(f"{self.name} {self.split} {row}".encode()).digest()[:16])
        # Philox's own numbers are the same in every version of numpy; what its distributions make of them may not be.
        bits = np.random.Philox(key=key)
        return self.task.draw(self.length + 1, lambda count, below: bits.random_raw(count) % np.uint64(below))


def fingerprint(splits: Iterable[Probe]) -> str:
    """sha256 over what the rows hang on, and over the first rows themselves."""
    digest = hashlib.sha256()
    for rows in splits:
        digest.update(f"{rows.name} {rows.split} {rows.length} {len(rows)}".encode())
        digest.update(rows[np.arange(16)].astype("<i4"))
    return digest.hexdigest()


Draw = Callable[[int, int], np.ndarray]  # count, below -> so many random whole numbers


def _repeated(size: int, draw: Draw, backwards: bool) -> Row:
    """Strings of any length that the row has room for, each with its copy, until it is full."""
    tokens, at, source = np.full(size, ord(";"), np.uint8), [], []
    start = 0
    while (room := (size - start - 2) // 2) > 0:
        count = 1 + int(draw(1, room)[0])
        there = np.arange(start, start + count)
        here = there + count + 1
        tokens[there] = LETTERS[draw(count, len(LETTERS))]
        tokens[start + count] = ord("|")
        from_ = there[::-1] if backwards else there
        tokens[here] = tokens[from_]
        at.append(here)
        source.append(from_)
        start += 2 * count + 2
    return Row(tokens, np.concatenate(at), np.concatenate(source))


def _copy(size: int, draw: Draw) -> Row:
    return _repeated(size, draw, backwards=False)


def _reverse(size: int, draw: Draw) -> Row:
    return _repeated(size, draw, backwards=True)


def _induction(size: int, draw: Draw) -> Row:
    pairs = size // 2 + 1
    # The smaller of two draws: some capitals come back soon and often, some after a long time.
    key = np.minimum(draw(pairs, len(CAPITALS)), draw(pairs, len(CAPITALS)))
    value = draw(len(CAPITALS), len(LETTERS))
    tokens = np.stack([CAPITALS[key], LETTERS[value[key]]], 1).reshape(-1)[:size]
    last: dict[int, int] = {}
    at, source = [], []
    for pair, each in enumerate(key.tolist()):
        if each in last and 2 * pair + 1 < size:
            at.append(2 * pair + 1)
            source.append(2 * last[each] + 1)
        last[each] = pair
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
    """What a probe is."""

    draw: Callable[[int, Draw], Row]  # of so many tokens
    shortest: int  # data.length that it takes
    choices: int  # symbols that an answer is one of: guessing is right once in so many times


PROBES = {
    "copy": Task(_copy, 16, len(LETTERS)),
    "reverse": Task(_reverse, 16, len(LETTERS)),
    "induction": Task(_induction, 16, len(LETTERS)),
    "passkey": Task(_passkey, 32, len(DIGITS)),
}
