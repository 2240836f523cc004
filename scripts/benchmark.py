"""Measure how fast the programs are: per encoding, in ensembles, by depth and by length; a table, JSON and a figure."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from configs import lm
from configs.presets import ATTENTIONS, POSITIONS, SCALES, parse, pick
from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.benchmark                                      four minutes at scale tiny on two CPU cores
  python -m scripts.benchmark --encodings=all --out=results/benchmark
  python -m scripts.benchmark --encodings=none,rotary --only-encodings
  python -m scripts.benchmark --shape=width=64,layers=2,length=128 --out=results/benchmark

Every ratio is of programs that took turns in one process. FLOPs are counted by rope_lm.transformer.flops_per_token, the
causal half of attention alone; utilisation is their rate over that of a square matrix product in the same run. Prefill
is reading half a row at once, and a token the time of each of the other half, one by one with the cache, of one row."""
FEW = "none,learned,sinusoidal,relative_bias,rotary"
SHAPE = ("width", "layers", "heads", "length", "batch")


def main() -> int:
    parser = entry.parser("benchmark", __doc__, EXAMPLES)
    parser.add_argument("--scale", default="tiny", help=f"one or more of {', '.join(SCALES)}, with commas (tiny)")
    parser.add_argument("--shape", default="", help="changes to the scale: width=,layers=,heads=,length=,batch=")
    parser.add_argument("--encodings", default=FEW, help=f"with commas, or all ({FEW})")
    parser.add_argument("--attention", default="softmax", help=f"{' or '.join(ATTENTIONS)} (softmax)")
    parser.add_argument("--only-encodings", action="store_true", help="leave out ensembles, depth, length, decoding")
    parser.add_argument("--out", help="a folder for benchmark.json and benchmark.svg (nothing is written)")
    arguments = parser.parse_args()
    scales = [(scale, pick("--scale", scale, SCALES)) for scale in arguments.scale.split(",")]
    pick("--attention", arguments.attention, ATTENTIONS)
    names = [name for name in POSITIONS if _fits(name, arguments.attention)]
    if arguments.encodings != "all":
        names = arguments.encodings.split(",")
        for name in names:
            pick("--encodings", name, POSITIONS)
    shape = _shape(arguments.shape)
    entry.huge_pages()
    from rope_lm import benchmark

    result: dict = {"machine": _machine(), "rows": []}
    console = Console()
    for scale, preset in scales:
        configs = {name: _config(name, arguments.attention, scale, shape) for name in names}
        peak = benchmark.matmul_peak(preset["model"]["dtype"])
        result["peak_flops"] = peak
        rows = benchmark.encodings(configs, peak)
        result["rows"] += [{"scale": scale, **row} for row in rows]
        console.print(_table(scale, rows, peak))
        if not arguments.only_encodings:
            result[scale] = _more(benchmark, scale, shape, console)
    if arguments.out:
        _write(Path(arguments.out), result)
    return 0


def _fits(name: str, attention: str) -> bool:
    """Whether an encoding can act in an attention."""
    from rope_lm.attention import ATTENTIONS
    from rope_lm.positional import ENCODINGS

    try:
        ATTENTIONS[attention].check(name, ENCODINGS[name])
    except Refusal:
        return False
    return True


def _more(benchmark, scale: str, shape: dict[str, int], console: Console) -> dict:
    """Everything that is measured of rotary alone; printed as it comes."""
    config = _config("rotary", "softmax", scale, shape)
    found: dict = {"encoding": "rotary"}
    say = lambda text: console.print(text, highlight=False)  # noqa: E731
    found["parts"] = split = benchmark.parts(config)
    say("a step: " + ", ".join(f"{key.split('_')[0]} {1e3 * value:.0f} ms" for key, value in split.items()))
    found["host"] = benchmark.host(config, steps=20)
    say(f"the host waits for data {100 * found['host']['data_wait_share']:.2f}% of the time")
    found["bookkeeping"] = benchmark.bookkeeping(config, steps=200)
    say(f"logging and saving take {100 * found['bookkeeping']['bookkeeping_share']:.2f}% of a run of 200 steps")
    found["ensembles"] = benchmark.ensembles(config, (1, 2, 4, 8))
    for row in found["ensembles"][1:]:
        say(f"{row['members']} members: {row['over_in_turn']:.2f} of the time of {row['members']} runs in turn")
    found["depths"] = benchmark.depths(config, (2, 16))
    say("compiling: " + ", ".join(f"{row['layers']} layers {row['compile_seconds']:.1f} s" for row in found["depths"]))
    for attention in ATTENTIONS:
        rows = benchmark.lengths(_config("rotary", attention, scale, shape), (128, 256, 512, 1024, 2048, 4096))
        found["lengths" if attention == "softmax" else f"lengths_{attention}"] = rows
        each = (
            f"{r['length']}: {1e6 * r['seconds_per_token']:.0f} us, {r['bytes_per_token'] / 1e3:.0f} kB" for r in rows
        )
        say(f"{attention}, a token of rows of " + "; ".join(each))
    return found


def _shape(text: str) -> dict[str, int]:
    chosen = {key: value for key, value in parse(text, dict.fromkeys(SHAPE, "")).items() if value}
    for key, value in chosen.items():
        if not value.isdigit() or int(value) < 1:
            raise Refusal(f"--shape={key}={value}: must be a whole number of at least 1")
    return {key: int(value) for key, value in chosen.items()}


def _config(name: str, attention: str, scale: str, shape: dict[str, int]) -> dict:
    config = lm.get_config(f"position={name},attention={attention},scale={scale}")
    for key, value in shape.items():
        (config.data if key in ("length", "batch") else config.model)[key] = value
    config.data.validation = 8
    return entry.plain(config)


def _machine() -> dict[str, object]:
    import jax

    names = subprocess.run(["sh", "-c", "grep -m1 'model name' /proc/cpuinfo || sysctl -n machdep.cpu.brand_string"],
                           capture_output=True, text=True).stdout.split(":")[-1].strip()  # fmt: skip
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "cpu": names,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "time": time.strftime("%Y-%m-%d"),
    }


def _table(scale: str, rows: list[dict], peak: float) -> Table:
    shape = ", ".join(f"{key} {value}" for key, value in rows[0]["shape"].items())
    kernels = ", ".join(sorted({row["kernel"] for row in rows}))
    heads = ("compile s", "step ms", "tokens /s", "of peak", "over none", "MB", "prefill ms", "token ms")
    table = Table(
        Column("encoding", no_wrap=True),
        *(Column(head, justify="right", min_width=max(map(len, head.split()))) for head in heads),
        title=f"{scale}: {shape}; kernel {kernels}; matmul peak {peak / 1e9:,.0f} GFLOP/s",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for row in rows:
        table.add_row(
            row["encoding"],
            f"{row['compile_seconds']:.1f}",
            f"{1e3 * row['step_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * row['utilization']:.0f}%",
            "" if row["overhead"] is None or row["encoding"] == "none" else f"{100 * row['overhead']:+.1f}%",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{1e3 * row['prefill_seconds']:.1f}",
            f"{1e3 * row['token_seconds']:.2f}",
        )
    return table


def _write(out: Path, result: dict) -> None:
    from rope_lm.analysis import figures

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
        figures.save(figures.speeds(result["rows"]), out / "benchmark")
    except OSError as error:
        raise Refusal(f"--out={str(out)!r} cannot be written ({error.strerror}): choose another folder") from error


if __name__ == "__main__":
    entry.end(main)
