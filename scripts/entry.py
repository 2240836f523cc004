"""Start and end of every script: flags, one-line answers to mistakes, and the process that it runs in."""

import argparse
import difflib
import errno
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from configs import lm
from rope_lm import environment, machine, settings, signals
from rope_lm.refusal import Refusal

# Names that other projects give to keys of configs/lm.py.
ELSEWHERE = {"epochs": "steps", "iters": "steps", "seq_len": "length", "context": "length", "block_size": "length"}
ELSEWHERE |= dict.fromkeys(("dim", "d_model", "n_embd", "hidden_size", "embed_dim"), "width")


class _LossyFile(io.FileIO):
    """A stream that may be gone (`| head`, a dead sweep) or full: output that does not fit is dropped."""

    def write(self, content: Any, /) -> int:
        with suppress(OSError):
            return super().write(content) or len(content)
        return len(content)


def _lossy(stream: TextIO | None) -> TextIO | None:
    if stream is None:  # closed from the start
        return None
    raw = io.BufferedWriter(_LossyFile(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)


def _interrupt(number: int) -> NoReturn:
    raise KeyboardInterrupt


def end(main: Callable[[], int], trains: bool = False) -> NoReturn:
    """Run `main` and exit with its status; an error that a person can fix is one line without a traceback.

    The status is 2 for a Refusal, 1 for too little memory or a full disk, and 75 for Ctrl-C when there is nothing to
    save, in a `main` that trains also for the other signals that ask it to stop. Such a `main` is not ended by output
    that nobody reads.
    """
    for name in environment.PINNED:  # without effect, but JAX does not start where it cannot read one
        os.environ.pop(name.upper(), None)
    os.environ.setdefault("NPROC", str(machine.cores()))  # threads of XLA, which does not see a container's quota
    if trains:
        signals.answer(_interrupt)  # as Ctrl-C, until there is something to save
        sys.stdout, sys.stderr = map(_lossy, (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else closed from the start
            stream.reconfigure(errors="backslashreplace")  # a terminal may not hold every character
    try:
        sys.exit(main())
    except Refusal as refusal:
        _fail(refusal, 2)
    except MemoryError as error:
        _fail(error, 1)
    except BrokenPipeError:  # whoever read the output has seen enough
        if trains:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            _fail(f"{error.filename!r}: {error.strerror}: give a folder that can be written", 2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _fail(f"{error}: free some space; the same command goes on from the last checkpoint", 1)
    except KeyboardInterrupt:
        _fail("stopped", signals.STOPPED)


def start(main: Callable[[], int], usage: str) -> NoReturn:
    """Parse absl's flags, then `end` a script that trains."""
    if {"-h", "-help", "--help"} & set(sys.argv[1:]):
        known = flags.FLAGS.flags_by_module_dict()[sys.argv[0]]
        shown = [usage.strip(), "", "Flags:", *(f"  --{flag.name:<10} {flag.help}" for flag in known)]
        end(lambda: print("\n".join(shown)) or 0)
    # A shell resolves `~` at the beginning of a word only.
    sys.argv = [re.sub("^(--?config=)(~[^:]*)", lambda flag: f"{flag[1]}{path(flag[2])}", word) for word in sys.argv]
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except Exception as error:  # flags report a bad value by many types of exceptions
        _fail(_unknown_flag(error) or error, 2)
    if rest:
        _fail(f"unexpected argument {rest[0]!r}: flags look like --workdir=runs/a; see --help", 2)
    end(main, trains=True)


def _unknown_flag(error: Exception) -> Refusal | None:
    """Return the Refusal for a flag that is not a key of the config; None if `error` has another cause."""
    path = next((word.partition("=")[2] for word in sys.argv if re.match("--?config=", word)), "")
    try:
        config = flags.FLAGS["config"].parser.parse(path)
    except Exception:  # the file's own, which `error` tells
        return None
    keys = _keys(plain(config))
    foreign = error.flagname if isinstance(error, flags.UnrecognizedFlagError) and "Did you" not in str(error) else ""
    for word in sys.argv[1:]:
        flag = re.match(r"(--?(?:no)?(config\.)?)([\w.-]+)(?:=(.*))?$", word)
        if flag and (not _is_value(keys, flag[3]) if flag[2] else flag[3] == foreign):
            return _no_such_key(flag[1], flag[3], flag[4] or "...", keys, path)
    return None


def _keys(config: Any, at: str = "") -> dict[str, Any]:
    """Return the value of every key of a config, sections too, by its dotted path."""
    keys: dict[str, Any] = {}
    for key, value in config.items() if isinstance(config, dict) else ():
        keys |= {f"{at}{key}": value} | _keys(value, f"{at}{key}.")
    return keys


def _is_value(keys: dict[str, Any], path: str) -> bool:
    return path in keys and not isinstance(keys[path], dict)


def _no_such_key(dashes: str, given: str, value: str, keys: dict[str, Any], path: str) -> Refusal:
    """Return the Refusal for a flag that sets no value of the config: its nearest keys, or the config string."""
    section, _, name = given.rpartition(".")
    sweep = "arms" in keys
    if sweep and name == "position":
        return Refusal(f"{dashes}{given}={value}: each arm of a sweep has a position of its own; --only picks arms")
    if name in lm.DEFAULTS:
        chosen = f"{path}{',' if ':' in path else ':'}{name}={value}"
        return Refusal(f"{dashes}{given}={value}: a {name} is chosen in the config string: --config={chosen}")
    if isinstance(keys.get(given), dict):
        inner = ", ".join(f"--config.{given}.{key}" for key in keys[given])
        return Refusal(f"{dashes}{given}={value}: this is a section; set one of its keys: {inner}")
    name = ELSEWHERE.get(name, name)

    def likeness(key: str) -> tuple[float, float]:
        last = key.rpartition(".")[2]
        words = last.split("_")
        short = name in words or name == "".join(word[:1] for word in words)  # rate, lr
        alike = max(difflib.SequenceMatcher(None, name, last).ratio(), 0.8 * short)
        return alike, difflib.SequenceMatcher(None, given, key).ratio()

    values = [key for key in keys if _is_value(keys, key) and (not sweep or key[:5] == "base." or given[:5] == "arms.")]
    nearest = sorted(values, key=likeness, reverse=True)[:3]
    nearest = [key for key in nearest if likeness(key)[0] >= max(0.6, likeness(nearest[0])[0] - 0.1)]
    if nearest:
        hint = f"did you mean {' or '.join(f'--config.{key}' for key in nearest)}?"
    else:
        inside = [key for key in values if key.startswith(f"{section}.")] or values
        hint = f"the keys are {', '.join(inside)}"
    return Refusal(f"unknown flag {dashes}{given}: {hint}")


def _fail(why: object, status: int) -> NoReturn:
    print(f"error: {' '.join(str(why).split())}", file=sys.stderr)
    sys.exit(status)


def parser(script: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return the parser of a script that takes no config."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"python -m scripts.{script}", None, description, examples, formatter_class=layout)


def workdirs(roots: Iterable[Path]) -> Iterator[Path]:
    """Yield the folders of all runs below these; a folder without a run itself, so that its reader refuses it."""
    for root in roots:
        yield from sorted({path.parent for path in root.rglob("config.json")}) or [root]


def multiples(text: str) -> list[int]:
    """Return the numbers of a flag --multiples."""
    if not all(number.isdecimal() and int(number) > 0 for number in text.split(",")):
        raise Refusal(f"--multiples={text}: must be whole numbers of at least 1, with commas")
    return [int(number) for number in text.split(",")]


def path(text: str) -> Path:
    """Return the path that a flag or an argument of a parser gives, with `~` resolved."""
    return settings.path(text, text)


def workdir(holder: flags.FlagHolder) -> Path:
    """Return the folder that the flag --workdir gives. Raises Refusal if it was not given."""
    if not holder.value:
        raise Refusal(f"--{holder.name} is missing; see --help")
    return settings.folder(holder.value, f"--{holder.name}={holder.value}")


def config(holder: flags.FlagHolder) -> dict[str, Any]:
    """Return the config as plain data. Raises Refusal if it was not given, or if there is no such file."""
    if holder.value is None:
        raise Refusal("--config is missing: --config=configs/lm.py:position=rotary,data=stdlib,scale=tiny; see --help")
    if not isinstance(holder.value, ConfigDict):
        path = config_flags.get_config_filename(flags.FLAGS[holder.name])
        raise Refusal(f"--config: there is no file {path!r}; see configs/ (lm.py for a run, ablation.py for a sweep)")
    return plain(holder.value)


def plain(value: Any) -> Any:
    """Return a config as dicts and tuples of numbers and text, with references resolved."""
    if isinstance(value, FieldReference):
        return plain(value.get())
    if isinstance(value, (ConfigDict, dict)):
        return {key: plain(inner) for key, inner in value.items()}
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def overrides(holder: flags.FlagHolder) -> dict[str, Any]:
    """Return the config values that flags have set, by dotted key ("model.width")."""
    return config_flags.get_override_values(flags.FLAGS[holder.name])


def huge_pages() -> None:
    """Start this process again, once, with 2 MB pages for large allocations (glibc on Linux).

    Every step allocates its buffers anew, and with 4 kB pages a third of a small model's step is page faults. glibc
    reads the setting only at the start. Results do not change.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cores_as_devices(*configs: dict[str, Any]) -> None:
    """Make JAX see each core that this process may use as a device, or as many as divide the rows of every config.

    Each core then computes its own rows from the first layer to the last, which is faster than sharing every product.
    Nothing changes if a mesh is not the default one (all devices, for data), if XLA_FLAGS sets the number of devices,
    or for a config that cannot be trained: that is refused later, with the reason. It has no effect on GPUs and TPUs.
    """
    import jax

    given, default = os.environ.get("XLA_FLAGS", ""), {"member": 1, "data": -1, "fsdp": 1, "tensor": 1}
    if "host_platform_device_count" in given or any(config.get("mesh") != default for config in configs):
        return
    pieces = []  # the rows of one piece of a batch
    for config in configs:
        batch, steps = (config.get(a, {}).get(b) for a, b in (("data", "batch"), ("optimizer", "accumulation_steps")))
        if not all(type(number) is int and number > 0 for number in (batch, steps)) or batch < steps:
            return
        pieces.append(batch // steps)
    rows = math.gcd(*pieces)
    count = max(n for n in range(1, min(machine.cores(), rows) + 1) if rows % n == 0)
    jax.config.update("jax_num_cpu_devices", count)
    # A process that was halted for longer than XLA's 40 seconds, or a laptop that slept, goes on instead of aborting.
    if "collective_call_terminate" not in given:
        os.environ["XLA_FLAGS"] = f"{given} --xla_cpu_collective_call_terminate_timeout_seconds=1000000".strip()


def compilation_cache(folder: str) -> None:
    """Keep compiled programs in `folder`, so that a second start or a resumed run does not compile again."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(settings.folder(folder, f"data.cache={folder}") / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
