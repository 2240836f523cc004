"""Probes: every answer repeats an earlier token at its distance, and a row depends on its number alone."""

import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rope_lm.data import batches
from rope_lm.data.probes import PROBES, Probe
from rope_lm.refusal import Refusal
from tests.data.conftest import Make

LENGTHS = st.integers(32, 300)
ROWS = st.integers(0, 2**14 - 1)


def text(probe: Probe, row: int) -> str:
    return bytes(probe[np.array([row])][0].astype(np.uint8)).decode("ascii")


def marked(probe: Probe, row: int) -> list[int]:
    """Return the places of a row's answers."""
    return (np.flatnonzero(probe.answers(row).mask) + 1).tolist()


@pytest.mark.parametrize("name", PROBES)
@given(length=LENGTHS, row=ROWS, split=st.sampled_from(["train", "validation", "test"]))
def test_an_answer_repeats_the_token_at_its_distance(name: str, length: int, row: int, split: str) -> None:
    probe = Probe(name, length, split)
    tokens, (mask, distance) = probe[np.array([row])][0], probe.answers(row)
    assert tokens.shape == (length + 1,) and tokens.dtype == np.int32 and tokens.max() < 128
    assert mask.shape == distance.shape == (length,) and mask.any()
    at = np.flatnonzero(mask)
    assert (tokens[at + 1] == tokens[at + 1 - distance[at]]).all() and (distance[at] > 0).all()
    assert (distance[at] <= at + 1).all() and (distance[~mask] == 0).all()


@given(length=LENGTHS, row=ROWS)
@pytest.mark.parametrize("name", ["copy", "reverse"])
def test_a_string_is_followed_by_its_copy(name: str, length: int, row: int) -> None:
    probe = Probe(name, length, "train")
    said = text(probe, row)
    answers, end = [], 0
    for found in re.finditer(r"([a-z]+)\|([a-z]+);?", said):
        assert found.start() == end, "nothing between them"
        assert found[2] == (found[1] if name == "copy" else found[1][::-1])
        answers += range(found.start(2), found.end(2))
        end = found.end()
    assert set(said[end:]) <= {";"} and len(said) - end <= 3, "as many as there is room for"
    assert marked(probe, row) == answers


@given(length=LENGTHS, row=ROWS)
def test_what_followed_a_capital_follows_it_again(length: int, row: int) -> None:
    probe = Probe("induction", length, "train")
    said, answers, last = text(probe, row), [], {}
    for at in range(0, len(said) - 1, 2):
        capital, letter = said[at : at + 2]
        assert capital.isupper() and letter.islower()
        if capital in last:
            assert said[last[capital]] == letter and probe.answers(row).distance[at] == at + 1 - last[capital]
            answers.append(at + 1)
        last[capital] = at + 1
    assert marked(probe, row) == answers


@given(length=LENGTHS, row=ROWS)
def test_a_key_is_asked_for_at_the_end(length: int, row: int) -> None:
    probe = Probe("passkey", length, "train")
    said = text(probe, row)
    before, key, again = re.fullmatch(r"([a-z. ]*)<(\d{8})>[a-z. ]*\?(\d{8})", said).groups()
    assert key == again and marked(probe, row) == list(range(len(said) - 8, len(said)))
    assert set(probe.answers(row).distance) == {0, len(said) - 8 - len(before) - 1}


@pytest.mark.parametrize("name", PROBES)
def test_distances_cover_the_row(name: str) -> None:
    """Otherwise there would be no accuracy by distance."""
    probe = Probe(name, 128, "train")
    answers = [probe.answers(row) for row in range(400)]
    distance = np.concatenate([each.distance[each.mask] for each in answers])
    shares = np.bincount(np.log2(distance).astype(int), minlength=7) / len(distance)
    assert (shares[3 if name == "passkey" else 1 : 6] > 0.02).all(), shares  # a passkey has 8 digits
    assert distance.max() > 128 / 2 - 8


@pytest.mark.parametrize("name", PROBES)
def test_rows_depend_on_their_number_and_no_two_splits_share_one(name: str) -> None:
    splits = {
        split: [text(Probe(name, 64, split), row) for row in range(500)] for split in ("train", "validation", "test")
    }
    assert splits["train"] == [text(Probe(name, 64, "train"), row) for row in range(500)]
    everything = [row for rows in splits.values() for row in rows]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    "name, digest",
    [
        ("copy", "fa7d8f076677c523"),
        ("reverse", "812f5bacfc9da1ba"),
        ("induction", "d1ef27440df61ff4"),
        ("passkey", "616c36588de6b63e"),
    ],
)
def test_rows_are_those_of_the_archived_results(name: str, digest: str) -> None:
    rows = Probe(name, 128, "train")[np.array([0, 1, 2**24 - 1])]
    assert hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()[:16] == digest


def test_data_of_a_probe(make: Make, tmp_path: Path) -> None:
    made = make("probe:copy", cache=str(tmp_path), length=64, batch=4, validation_rows=8)
    assert made.vocabulary == 257 and made.bytes_per_token == 1
    assert made.validation.shape == (8, 65) and made.train[np.arange(4)].shape == (4, 65)
    valid, order = Probe("copy", 64, "validation"), [0, *range(1, 7), 7]
    assert all(
        (made.validation[i] == valid[np.array([round(each * (len(valid) - 1) / 7)])][0]).all()
        for i, each in enumerate(order)
    )
    np.testing.assert_array_equal(made.validation_documents, batches.spread(valid, 8)[:, None].repeat(65, 1))
    read = next(made.batches([3], 2, 3)).rows[0]
    np.testing.assert_array_equal(read, batches.draw(made.train, 4, 3, 2))
    assert all(bytes(row.astype(np.uint8)).count(b"|") > 0 for row in read)
    assert not list(tmp_path.iterdir()), "nothing is kept on disk"
    probes = itertools.product(("probe:copy", "probe:reverse"), (64, 65))
    prints = [make(name, length=length).fingerprint["text"] for name, length in probes]
    assert len(set(prints)) == 4 and prints[0] == made.fingerprint["text"]


@pytest.mark.parametrize(
    "name, changes, words",
    [
        (
            "probe:indction",
            {},
            "unknown probe 'indction': did you mean induction.*allowed: copy, induction, passkey, reverse",
        ),
        ("probe:", {}, "unknown data 'probe:': did you mean probe:NAME"),
        ("probe", {}, r"unknown data 'probe': did you mean .*probe:NAME"),
        ("probe:copy", {"length": 15}, "data.length=15: probe:copy needs rows of at least 16 tokens"),
        ("probe:passkey", {"length": 31}, "data.length=31: probe:passkey needs rows of at least 32 tokens"),
        ("probe:copy", {"tokenizer": "bpe:300"}, "data.tokenizer=bpe:300: the symbols of data=probe:copy are bytes"),
        ("probe:copy", {"split": "train"}, "only data=tfds:NAME has them"),
        ("probe:copy", {"validation_rows": 2**15}, "has 16384 rows of 64 tokens, data.validation_rows asks for 32768"),
    ],
)
def test_a_mistake_is_refused_in_one_line(make: Make, name: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(Refusal, match=words) as refused:
        make(name, **{"length": 64} | changes)
    assert "\n" not in str(refused.value)
