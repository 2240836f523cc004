"""Measure how fast training is: per encoding, in ensembles, by depth and by length; a table, JSON and a figure."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/benchmark.py`

import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from configs import lm
from configs.presets import ATTENTIONS, POSITIONS, SCALES, parse, pick
from rope_lm import machine
from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.benchmark                                      four to seven minutes at scale tiny on two CPU cores
  python -m scripts.benchmark --encodings=all --out=results/benchmark
  python -m scripts.benchmark --encodings=none,rotary --only-encodings
  python -m scripts.benchmark --shape=width=64,layers=2,length=128 --out=results/benchmark
  python -m scripts.benchmark --scale=gpt2 --shape=tokenizer=bpe:50304,tied=True --data=text:PATH

Everything compared took turns in one process, except compile times, which were measured once. FLOPs are counted by
rope_lm/costs.py; utilisation is their rate over that of a square matrix product in the same run, on as many devices.
Prefill reads half a row at once; a token is the mean time of each token of the other half, one by one with the cache,
in one row. With --out every section is written as soon as it is measured; a part that was refused says why.
exit status: 0, or 2 for a mistake in the command."""
FEW = ("none", "learned", "sinusoidal", "relative_bias", "rotary")
LISTS = {"few": FEW, "all": tuple(POSITIONS)}
MEMBERS, LAYERS, LENGTHS = (1, 2, 4, 8), (2, 16), (128, 512, 4096)
SHAPE = {  # key of --shape -> its section of a config
    "width": "model",
    "layers": "model",
    "heads": "model",
    "dtype": "model",
    "tied": "model",
    "kernel": "model.attention",
    "length": "data",
    "batch": "data",
    "tokenizer": "data",
}


def main() -> int:
    parser = entry.parser("benchmark", __doc__, EXAMPLES)
    parser.add_argument("--scale", default="tiny", help=f"one or more of {', '.join(SCALES)}, with commas (tiny)")
    parser.add_argument("--data", default="stdlib", help="the text, as in configs/lm.py (stdlib)")
    parser.add_argument("--shape", default="", help=f"changes to the scale: {'=,'.join(SHAPE)}=")
    parser.add_argument("--encodings", default="few", help=f"with commas, all, or few: {', '.join(FEW)} (few)")
    parser.add_argument("--attention", default="softmax", help=f"{' or '.join(ATTENTIONS)} (softmax)")
    parser.add_argument("--only-encodings", action="store_true", help="measure the encodings and nothing else")
    parser.add_argument(
        "--out", type=entry.path, help="a folder for benchmark.json and benchmark.svg (nothing is written)"
    )
    arguments = parser.parse_args()
    scales = arguments.scale.split(",")
    for scale in scales:
        pick("--scale", scale, SCALES)
    pick("--attention", arguments.attention, ATTENTIONS)
    names = arguments.encodings.split(",")
    for name in names if arguments.encodings not in LISTS else ():
        pick("--encodings", name, POSITIONS)
    shape = _shape(arguments.shape)
    entry.huge_pages()
    from rope_lm import benchmark, environment  # JAX, which takes seconds, in the process that stays

    environment.pin()
    entry.cores_as_devices(_config(f"scale={scales[0]}", shape))
    if arguments.encodings in LISTS:
        names = [name for name in LISTS[arguments.encodings] if _fits(name, arguments.attention)]
    result: dict = {"machine": _machine(), "rows": []}
    console = Console()
    save = partial(_write, arguments.out, result)
    # Empty, so that compile times are real, and a program measured in several ways compiles once.
    with tempfile.TemporaryDirectory() as folder:
        entry.compilation_cache(folder)
        for scale in scales:
            shared = f"scale={scale},data={arguments.data}"
            configs = {
                name: _config(f"position={name},attention={arguments.attention},{shared}", shape) for name in names
            }
            result["peak_flops"] = benchmark.matmul_peak(configs[names[0]]["model"]["dtype"])
            rows = benchmark.encodings(configs, result["peak_flops"])
            if not _measured(rows):
                raise Refusal(rows[0]["refused"])
            result["rows"] += [{"scale": scale, **row} for row in rows]
            console.print(_table(scale, _measured(rows)))
            for row in rows:
                if "refused" in row:
                    console.print(f"{row['encoding']} is refused: {row['refused']}", highlight=False)
            save(draw=True)
            if not arguments.only_encodings:
                result[scale] = {"encoding": "rotary"}
                _more(shared, shape, console, result[scale], save)
    return 0


def _measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "refused" not in row]


def _fits(name: str, attention: str) -> bool:
    """Return True if an encoding can act in an attention."""
    from rope_lm import attention as attentions
    from rope_lm.positional import Shape, effects

    config = _config(f"position={name},attention={attention},scale=nano", {})["model"]
    shape = Shape(config["width"], config["heads"], config["width"] // config["heads"], config["layers"], causal=True)
    section = config["attention"] | ({"kernel": "xla"} if "kernel" in config["attention"] else {})
    try:
        attentions.make(section, head_size=shape.head_size).check(name, effects(config["position"], shape))
    except Refusal:
        return False
    return True


def _more(shared: str, shape: dict[str, Any], console: Console, found: dict, save: Callable) -> None:
    """Measure what is measured for rotary only, into `found`; print and save each section as it comes."""
    from rope_lm import benchmark

    config = _config(f"position=rotary,{shared}", shape)
    say = partial(console.print, highlight=False)

    @contextmanager
    def section(name: str) -> Iterator[None]:
        try:
            yield
        except Refusal as refusal:
            found[name] = {"refused": str(refusal)}
            say(f"{name}: refused: {refusal}")
        save()

    def listed(rows: list[dict], text: Callable[[dict], str]) -> str:
        key = next(iter(rows[0]))
        return "; ".join(f"{row[key]}: {row['refused'] if 'refused' in row else text(row)}" for row in rows)

    def token(row: dict) -> str:
        return f"{1e6 * row['seconds_per_token']:.0f} us, {row['bytes_per_token'] / 1e3:.0f} kB"

    with section("parts"):
        found["parts"] = split = benchmark.parts(config)
        say("a step: " + ", ".join(f"{key.split('_')[0]} {1e3 * value:.0f} ms" for key, value in split.items()))
    with section("host"):
        found["host"] = benchmark.host(config, steps=20)
        say(f"the host waits for data {100 * found['host']['data_wait_share']:.2f}% of the time")
    with section("bookkeeping"):
        found["bookkeeping"] = kept = benchmark.bookkeeping(config)
        say(f"logging and saving take {100 * kept['bookkeeping_share']:.2f}% of a run of {kept['steps']} steps")
    with section("ensembles"):
        found["ensembles"] = rows = benchmark.ensembles(config, MEMBERS)
        say("members, over as many runs in turn: " + listed(rows, lambda row: f"{row['over_in_turn']:.2f}"))
    with section("depths"):
        found["depths"] = rows = benchmark.depths(config, LAYERS)
        say("layers, compiling: " + listed(rows, lambda row: f"{row['compile_seconds']:.1f} s"))
    with section("lengths"):
        configs = {each: _config(f"position=rotary,attention={each},{shared}", shape) for each in ATTENTIONS}
        for attention, rows in benchmark.lengths(configs, LENGTHS).items():
            found["lengths" if attention == "softmax" else f"lengths_{attention}"] = rows
            say(f"{attention}, per token in rows of " + listed(rows, token))


def _shape(text: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {key: value for key, value in parse(text, dict.fromkeys(SHAPE, "")).items() if value}
    for key, value in chosen.items():
        if key == "tied":
            chosen[key] = pick("--shape=tied", value, {"True": True, "False": False})
        elif key == "dtype":
            pick("--shape=dtype", value, dict.fromkeys(("float32", "bfloat16")))
        elif key not in ("tokenizer", "kernel"):
            least = 2 if key == "length" else 1  # half a row is read, the other half generated
            if not value.isdigit() or int(value) < least:
                raise Refusal(f"--shape={key}={value}: must be a whole number of at least {least}")
            chosen[key] = int(value)
    return chosen


def _config(text: str, shape: dict[str, Any]) -> dict:
    config = lm.get_config(text)
    for key, value in shape.items():
        if key != "kernel" or config.model.attention.name == "softmax":
            config.update_from_flattened_dict({f"{SHAPE[key]}.{key}": value})
    config.steps, config.data.validation_rows = 100, 8
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
        "cores": machine.cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "time": time.strftime("%Y-%m-%d"),
    }


def _table(scale: str, rows: list[dict]) -> Table:
    shape = ", ".join(f"{key} {value}" for key, value in rows[0]["shape"].items())
    kernels = ", ".join(sorted({row["kernel"] for row in rows}))
    heads = ("compile s", "step ms", "tokens /s", "of peak", "over none, %", "MB", "prefill ms", "token ms")
    table = Table(
        Column("encoding", no_wrap=True),
        *(Column(head, justify="right", min_width=max(map(len, head.split()))) for head in heads),
        title=f"{scale}: {shape}; kernel {kernels}; matmul peak {rows[0]['peak_flops'] / 1e9:,.0f} GFLOP/s",
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
            "" if row["overhead"] is None or row["encoding"] == "none" else f"{100 * row['overhead']:+.1f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{1e3 * row['prefill_seconds']:.1f}",
            f"{1e3 * row['token_seconds']:.2f}",
        )
    return table


def _write(out: Path | None, result: dict, draw: bool = False) -> None:
    from rope_lm.analysis import figures
    from rope_lm.run_directory import write_json

    if not out:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "benchmark.json", result)
        if draw:
            figures.save(figures.speeds(_measured(result["rows"])), out / "benchmark")
    except OSError as error:
        raise Refusal(f"--out={str(out)!r} cannot be written ({error.strerror}): choose another folder") from error


if __name__ == "__main__":
    entry.end(main)
