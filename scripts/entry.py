"""How scripts begin and end: their flags, mistakes in one line, the process they run in."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from rope_lm import machine, settings
from rope_lm.refusal import Refusal


class _Notices(io.FileIO):
    """A stream that may be gone (`| head`, a dead sweep), or full: what does not fit in is dropped."""

    def write(self, content: bytes) -> int:
        with suppress(OSError):
            return super().write(content) or len(content)
        return len(content)


def _as_notices(stream: TextIO | None) -> TextIO | None:
    if stream is None:  # closed from the start
        return None
    raw = io.BufferedWriter(_Notices(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)


def end(main: Callable[[], int], trains: bool = False) -> NoReturn:
    """Runs `main` and exits with its status; what a person can mend is one line, and no traceback.

    Status 2 for a Refusal, 1 for a lack of memory or of room on the disk, 75 for Ctrl-C where nothing is to be saved.
    Where `main` trains, nothing that it says can end it.
    """
    os.environ.setdefault("NPROC", str(machine.cores()))  # XLA's threads, which do not see a container's quota
    if trains:
        sys.stdout, sys.stderr = map(_as_notices, (sys.stdout, sys.stderr))
    try:
        sys.exit(main())
    except Refusal as refusal:
        _say(refusal, 2)
    except MemoryError as error:
        _say(error, 1)
    except BrokenPipeError:  # who read what is printed has seen enough
        if trains:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            _say(f"{error.filename!r}: {error.strerror}: give a folder that can be written", 2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _say(f"{error}: free some space; the same command goes on from the last checkpoint", 1)
    except KeyboardInterrupt:
        _say("stopped", 75)


def start(main: Callable[[], int], usage: str) -> NoReturn:
    """Parses absl's flags, then `end`, of a script that trains."""
    if any(each in ("-h", "-help", "--help") for each in sys.argv[1:]):
        print(usage.strip(), "\n\nFlags:")
        for flag in flags.FLAGS.flags_by_module_dict()[sys.argv[0]]:
            print(f"  --{flag.name:<10} {flag.help}")
        sys.exit(0)
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except Exception as error:  # what a flag says of its value comes in many types
        _say(error, 2)
    if rest:
        _say(f"unexpected argument {rest[0]!r}: flags look like --workdir=runs/a; see --help", 2)
    end(main, trains=True)


def _say(why: object, status: int) -> NoReturn:
    print(f"error: {' '.join(str(why).split())}", file=sys.stderr)
    sys.exit(status)


def parser(script: str, what: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a script that takes no config."""
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"python -m scripts.{script}", None, what, examples, formatter_class=shape)


def workdirs(roots: Iterable[Path]) -> Iterator[Path]:
    """The folders of all runs in these: of a run, or of a sweep. One that holds none is given back as it is: its reader
    says what is missing."""
    for root in roots:
        yield from sorted({each.parent for each in root.rglob("config.json")}) or [root]


def multiples(text: str) -> list[int]:
    """The numbers of a flag --multiples."""
    if not all(each.isdecimal() and int(each) > 0 for each in text.split(",")):
        raise Refusal(f"--multiples={text}: must be whole numbers of at least 1, with commas")
    return [int(each) for each in text.split(",")]


def required(holder: flags.FlagHolder) -> str:
    """The value of a flag that must be given."""
    if not holder.value:
        raise Refusal(f"--{holder.name} is missing; see --help")
    return holder.value


def config(holder: flags.FlagHolder) -> dict[str, Any]:
    """The config as plain data."""
    if holder.value is None:
        raise Refusal("--config is missing: --config=configs/lm.py:position=rotary,data=stdlib,scale=tiny; see --help")
    if not isinstance(holder.value, ConfigDict):
        path = config_flags.get_config_filename(flags.FLAGS[holder.name])
        raise Refusal(f"--config: there is no file {path!r}; see configs/ (lm.py for a run, ablation.py for a sweep)")
    return plain(holder.value)


def plain(value: Any) -> Any:
    """Dicts and tuples of numbers and text, references resolved."""
    if isinstance(value, FieldReference):
        return plain(value.get())
    if isinstance(value, (ConfigDict, dict)):
        return {key: plain(each) for key, each in value.items()}
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def overrides(holder: flags.FlagHolder) -> dict[str, Any]:
    """What flags changed in the config, by key ("model.width")."""
    return config_flags.get_override_values(flags.FLAGS[holder.name])


def provenance(holder: flags.FlagHolder) -> dict[str, Any]:
    """What the manifest says of the command and the machine."""
    from rope_lm import journal

    return journal.provenance(argv=sys.argv, overrides=overrides(holder))


def huge_pages() -> None:
    """Starts this process again with 2 MB pages for large allocations (glibc on Linux), once.

    A step allocates all that it works on afresh; with 4 kB pages a third of a small model's step is page faults: 56 ms
    instead of 41 on two CPU cores (64 wide, 2 layers, length 128, batch 16, 3 members). glibc reads the setting at
    start only. It changes no number.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cores_as_devices(config: dict[str, Any]) -> None:
    """Makes JAX see a device in every core that this process may use, or in as many as can share a batch evenly.

    Each core then computes rows of its own from the first layer to the last: 227 ms a step become 209 on two (128 wide,
    4 layers, length 256, batch 16), where one device shares out every product. Only where the mesh takes all devices,
    for data alone, and XLA_FLAGS does not say otherwise; of no effect beside a GPU or a TPU. What cannot be trained
    changes nothing: it is refused later, with the reason.
    """
    import jax

    given, whole = os.environ.get("XLA_FLAGS", ""), {"member": 1, "data": -1, "fsdp": 1, "tensor": 1}
    batch, pieces = (config.get(a, {}).get(b) for a, b in (("data", "batch"), ("optimizer", "accumulation_steps")))
    if "host_platform_device_count" in given or config.get("mesh") != whole:
        return
    if not all(type(each) is int and each > 0 for each in (batch, pieces)) or batch < pieces:
        return
    rows = batch // pieces
    count = max(n for n in range(1, min(machine.cores(), rows) + 1) if rows % n == 0)
    jax.config.update("jax_num_cpu_devices", count)
    # A process that was halted for longer than XLA's 40 seconds, or a laptop that slept, goes on instead of aborting.
    if "collective_call_terminate" not in given:
        os.environ["XLA_FLAGS"] = f"{given} --xla_cpu_collective_call_terminate_timeout_seconds=1000000".strip()


def compilation_cache(folder: str) -> None:
    """Compiled programs are kept in `folder`, so that a second start, or a resumed run, does not compile again."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(settings.path(folder, f"data.cache={folder}") / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
