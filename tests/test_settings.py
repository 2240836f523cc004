"""Sections of a config against the signature of the function that takes them."""

import os
from pathlib import Path

import pytest

from rope_lm.refusal import Refusal, unknown
from rope_lm.settings import bind, folder, path


def consumer(
    count: int, share: float, name: str, flag: bool, many: tuple[float, ...], maybe: int | None, *, extra: str
):
    pass


GOOD = {"count": 1, "share": 0.5, "name": "a", "flag": True, "many": (1.0, 2), "maybe": None}


def test_a_section_becomes_keyword_arguments():
    assert bind(consumer, GOOD, "here", {"extra": "x"}) == {**GOOD, "extra": "x"}
    assert bind(consumer, {**GOOD, "share": 1, "maybe": 3, "many": [1]}, "here", {"extra": "x"})["share"] == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"count": True}, "here.count=True: must be a whole number"),
        ({"count": 1.0}, "here.count=1.0: must be a whole number"),
        ({"count": None}, "here.count=None: must be a whole number"),
        ({"share": float("nan")}, "here.share=nan: must be a finite number"),
        ({"share": float("inf")}, "here.share=inf: must be a finite number"),
        ({"many": (1.0, float("-inf"))}, "here.many=.*each a finite number"),
        ({"share": "1"}, "here.share='1': must be a finite number"),
        ({"name": 1}, "here.name=1: must be text"),
        ({"flag": 1}, "here.flag=1: must be True or False"),
        ({"many": ()}, "here.many=.*one or more values, each a finite number"),
        ({"many": (1.0, True)}, "here.many=.*each a finite number"),
        ({"maybe": "x"}, "here.maybe='x': must be a whole number or None"),
        ({"cuont": 1}, "unknown key in here 'cuont': did you mean count"),
    ],
)
def test_a_value_that_does_not_fit_is_one_line(change, words):
    with pytest.raises(Refusal, match=words):
        bind(consumer, {**GOOD, **change}, "here", {"extra": "x"})


def test_a_missing_key_is_named():
    with pytest.raises(Refusal, match="here lacks share, flag: a config names every value"):
        bind(
            consumer, {key: value for key, value in GOOD.items() if key not in ("share", "flag")}, "here", {"extra": ""}
        )


def test_nearest_names_come_first_and_a_long_catalogue_is_not_printed():
    assert str(unknown("thing", "rotry", ["none", "rotary"])) == (
        "unknown thing 'rotry': did you mean rotary? (allowed: none, rotary)"
    )
    assert "100 names" in str(unknown("thing", "x", [f"name{i}" for i in range(100)]))


def test_a_path_starts_at_the_home_folder_or_here(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert path("~/a", "--x") == folder("~/a", "--x") == tmp_path / "a"
    assert path("a", "--x") == Path("a") and folder("a", "--x") == tmp_path / "a"
    with pytest.raises(Refusal, match="--x: there is no home folder ~no-one here; give a path without it"):
        folder("~no-one/a", "--x")


def test_a_folder_to_write_into_is_utf8_all_the_way(monkeypatch, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"\xff"))
    odd.mkdir()
    assert path(odd, "--x") == odd, "it can be read"
    with pytest.raises(Refusal, match=r"--x: the path '.*a\\udcff' is not UTF-8; give one that is"):
        folder(odd, "--x")
    monkeypatch.chdir(odd)
    with pytest.raises(Refusal, match="is not UTF-8"):
        folder("a", "--x")
