"""The benchmark: what it computes from its times, what it writes, what it keeps when something is refused."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from configs import lm
from rope_lm import benchmark, loop, timing
from rope_lm.checkpoint import Checkpoints
from rope_lm.plan import plan as planned
from rope_lm.refusal import Refusal
from scripts import benchmark as script
from scripts import entry

ROOT = Path(__file__).parents[1]
SHAPE = "--shape=width=16,layers=1,heads=2,length=16,batch=4"
ROW = {
    **dict.fromkeys(("compile_seconds", "step_seconds", "tokens_per_second", "utilization", "overhead"), 0.5),
    **dict.fromkeys(("peak_flops", "peak_bytes"), 1e9),
    **dict.fromkeys(("prefill_seconds", "token_seconds"), 0.5),
    **{"encoding": "none", "shape": {"width": 16}, "kernel": "blocked"},
}
# The script with shorter lists than a person waits for; JAX is not imported by a process that will start again.
SHORT = """
import sys
from scripts import benchmark, entry
def huge_pages():
    assert "jax" not in sys.modules
entry.huge_pages = huge_pages
benchmark.MEMBERS, benchmark.LAYERS, benchmark.LENGTHS = (1, 2), (1, 2), (8, 64)
entry.end(benchmark.main)
"""


@pytest.fixture
def config(text, cache) -> dict:
    config = lm.get_config(f"position=rotary,data=text:{text}")
    config.data.update({"length": 8, "batch": 2, "validation_rows": 1, "cache": cache})
    config.model.update({"width": 8, "heads": 2, "layers": 1})
    return entry.plain(config)


@pytest.fixture
def script_main(monkeypatch):
    """The script in this process, called with flags."""
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # else it would start again
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")  # what this process has
    monkeypatch.setattr(entry, "compilation_cache", lambda folder: None)  # this process has one

    def main(*flags: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
        return script.main()

    return main


def clock_that_says(monkeypatch, seconds) -> None:
    """The calls are made; the time that each took is the next of `seconds`."""
    says = itertools.cycle(seconds)

    def clock(call) -> float:
        jax.block_until_ready(call())
        return next(says)

    monkeypatch.setattr(timing, "_seconds", clock)


@pytest.mark.all
def test_every_section_on_two_devices(tmp_path):
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    env |= {"COLUMNS": "80"}
    flags = SHAPE, "--encodings=none,rotary_features,rotary", f"--out={tmp_path}"
    done = subprocess.run([sys.executable, "-c", SHORT, *flags], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 and (tmp_path / "benchmark.svg").exists()
    result = json.loads((tmp_path / "benchmark.json").read_text())
    none, refused, rotary = result["rows"]
    assert [row["encoding"] for row in result["rows"]] == ["none", "rotary_features", "rotary"]
    assert refused.keys() == {"scale", "encoding", "refused"} and "attention=performer" in refused["refused"]
    assert none["overhead"] == 0 and rotary["overhead"] > -1
    shape = {"width": 16, "layers": 1, "heads": 2, "length": 16, "batch": 4}
    flops = 6 * (4 * 16 * 16 + 2 * 16 * script.lm.hidden(16, "gelu") + 16 * 257 + 2 * 16 * 16)
    for row in (none, rotary):
        assert row["shape"] == shape and row["dtype"] == "float32" and row["devices"] == 2
        assert row["tokens_per_second"] == pytest.approx(4 * 16 / row["step_seconds"])
        assert row["peak_flops"] == result["peak_flops"] > 1e8
        assert row["utilization"] == pytest.approx(row["tokens_per_second"] * flops / row["peak_flops"])
        assert row["compile_seconds"] > 0 and row["peak_bytes"] > 0 and row["prefill_seconds"] > 0
        assert row["decode_tokens_per_second"] == pytest.approx(1 / row["token_seconds"])
    more = result["tiny"]
    assert more.keys() == {
        "encoding", "parts", "host", "bookkeeping", "ensembles", "depths", "lengths", "lengths_performer"
    }  # fmt: skip
    assert more["parts"].keys() == {"forward_seconds", "backward_seconds", "optimizer_seconds"}
    assert 0 < more["host"]["data_wait_share"] < 1 and 0 < more["bookkeeping"]["bookkeeping_share"] < 1
    assert [row["members"] for row in more["ensembles"]] == [1, 2] and more["ensembles"][0]["over_in_turn"] == 1
    assert [row["layers"] for row in more["depths"]] == [1, 2] and more["depths"][0]["compile_seconds"] > 0
    for rows in (more["lengths"], more["lengths_performer"]):
        assert [(row["length"], row["batch"]) for row in rows] == [(8, 8), (64, 1)]
        assert all(row["seconds_per_token"] > 0 and row["bytes_per_token"] > 0 for row in rows)


def test_overhead_and_decoding_are_medians_over_rounds(config, monkeypatch):
    """A machine that slows down: the ratio within each round is what it always was."""
    seconds = []
    for number in range(16):
        seconds += [1.0 + number % 5, (1.0 + number % 5) * (1.25 if number % 3 else 9)]
    for number in range(6):
        seconds += [2.0, 4.0 + 100 * (number == 3), 3.0, 8.0 + 100 * (number == 4)]
    clock_that_says(monkeypatch, seconds)
    none = {**config, "model": {**config["model"], "position": {"name": "none"}}}
    rows = benchmark.encodings({"none": none, "rotary": config}, peak=1e9)
    assert [row["overhead"] for row in rows] == [0, pytest.approx(0.25)]
    assert [row["prefill_seconds"] for row in rows] == [2, 3] and [row["token_seconds"] for row in rows] == [1, 2]
    plan = planned(config)
    rate = 2 * 8 / rows[1]["step_seconds"]
    assert rows[1]["utilization"] == pytest.approx(rate * plan.flops_per_token / 1e9)


def test_parts_are_medians_of_what_a_round_took_more(config, monkeypatch):
    clock_that_says(monkeypatch, [9, 9, 9, 1, 3, 2, 5, 7, 6, 9, 2, 1])
    assert benchmark.parts(config) == {"forward_seconds": 5, "backward_seconds": 2, "optimizer_seconds": -1}


def test_seconds_per_step_are_the_median_after_the_first(config, monkeypatch):
    clock_that_says(monkeypatch, [100, 5, 1, 4, 2, 3])
    assert timing.seconds_per_step(planned(config)) == 3


@pytest.mark.all
def test_lengths_of_all_attentions_take_turns(config, monkeypatch):
    asked = []
    monkeypatch.setattr(
        timing,
        "_seconds",
        lambda call: asked.append((call.plan.program.execution.kernel, call.plan.data.length)) or 1.0,
    )
    performer = {**config["model"], "attention": {"name": "performer", "features": 4, "redraw": 9, "block": 4}}
    rows = benchmark.lengths({"softmax": config, "performer": {**config, "model": performer}}, (4, 8))
    assert asked == 4 * [("blocked", 4), ("blocked", 8), ("performer", 4), ("performer", 8)]
    assert [row["seconds_per_token"] for row in rows["performer"]] == [1 / 16, 1 / 16]


def test_a_call_of_the_peak_takes_ten_milliseconds(monkeypatch):
    taken, clock = [], timing._seconds
    monkeypatch.setattr(timing, "_seconds", lambda call: taken.append(clock(call)) or taken[-1])
    assert benchmark.matmul_peak("float32", size=128) > 1e8
    assert len(taken) > 8 and min(taken[-7:]) >= 0.01


def test_bookkeeping_contains_the_wait_for_the_last_save(config, monkeypatch, tmp_path):
    seal = Checkpoints._seal
    monkeypatch.setattr(Checkpoints, "_seal", lambda *arguments: (time.sleep(1), seal(*arguments)))
    loop.train({**config, "steps": 2}, tmp_path, {})
    assert json.loads((tmp_path / "manifest.json").read_text())["bookkeeping_seconds"] > 1


def test_what_was_measured_before_a_refusal_or_an_end_is_kept(script_main, monkeypatch, tmp_path):
    def refuse(*_: object):
        raise Refusal("too much: take less")

    def end(*_: object, **__: object):
        raise KeyboardInterrupt

    refused = {"encoding": "rotary", "refused": "too odd: take another"}
    monkeypatch.setattr(benchmark, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(benchmark, "encodings", lambda configs, peak: [ROW, refused])
    monkeypatch.setattr(benchmark, "parts", refuse)
    monkeypatch.setattr(benchmark, "host", lambda config, steps: {"data_wait_share": 0.5})
    monkeypatch.setattr(benchmark, "bookkeeping", end)
    with pytest.raises(KeyboardInterrupt):
        script_main(f"--out={tmp_path}")
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result["rows"] == [{"scale": "tiny", **ROW}, {"scale": "tiny", **refused}]
    assert result["tiny"] == {
        "encoding": "rotary", "parts": {"refused": "too much: take less"}, "host": {"data_wait_share": 0.5}
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags, names",
    [
        ([], script.FEW),
        (["--attention=performer"], ("none", "learned", "sinusoidal", "rotary")),
        (["--attention=performer", "--encodings=none,relative_bias"], ("none", "relative_bias")),
    ],
)
def test_lists_hold_what_fits_the_attention(script_main, monkeypatch, flags, names):
    asked = []
    monkeypatch.setattr(benchmark, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(benchmark, "encodings", lambda configs, peak: asked.extend(configs) or [ROW])
    script_main("--only-encodings", *flags)
    assert tuple(asked) == names


def test_a_shape_reaches_the_config_and_the_text_too(script_main, monkeypatch, text):
    asked = {}
    monkeypatch.setattr(benchmark, "matmul_peak", lambda dtype: {"bfloat16": 2e9}[dtype])
    monkeypatch.setattr(benchmark, "encodings", lambda configs, peak: asked.update(configs) or [ROW])
    shape = "--shape=tokenizer=bpe:300,tied=True,kernel=xla,dtype=bfloat16,length=32,width=16,batch=2"
    script_main("--only-encodings", "--encodings=alibi", f"--data=text:{text}", shape)
    found = asked["alibi"]
    assert found["data"]["name"] == f"text:{text}" and found["data"]["tokenizer"] == "bpe:300"
    assert found["model"]["tied"] and found["model"]["attention"] == {"name": "softmax", "kernel": "xla"}
    assert (found["model"]["dtype"], found["model"]["width"], found["model"]["hidden"]) == ("bfloat16", 16, 64)
    assert (found["data"]["length"], found["data"]["batch"]) == (32, 2)
    script_main("--only-encodings", "--encodings=none", "--attention=performer", shape)
    assert asked["none"]["model"]["attention"]["name"] == "performer"


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--shape=length=1"], "--shape=length=1: must be a whole number of at least 2"),
        (["--shape=batch=0"], "--shape=batch=0: must be a whole number of at least 1"),
        (["--shape=tied=yes"], "unknown --shape=tied 'yes': (allowed: False, True)"),
        (["--shape=dtype=int8"], "unknown --shape=dtype 'int8': (allowed: bfloat16, float32)"),
        (["--shape=kernel=flash"], "unknown model.attention.kernel 'flash'"),
        (["--data=text:nowhere"], "nowhere"),
        (["--encodings=few,rotary"], "unknown --encodings 'few'"),
        (["--shape=heads=3"], "model.width=128 is not divisible by model.heads=3"),
        (["--attention=performer", "--encodings=alibi"], "linear attention has none: choose attention=softmax"),
    ],
)
def test_a_mistake_is_refused_in_one_line_and_nothing_is_written(script_main, monkeypatch, tmp_path, flags, says):
    monkeypatch.setattr(benchmark, "matmul_peak", lambda dtype: 1e9)
    with pytest.raises(Refusal) as refusal:
        script_main(f"--out={tmp_path / 'out'}", *flags)
    assert says in str(refusal.value) and "\n" not in str(refusal.value) and not (tmp_path / "out").exists()
