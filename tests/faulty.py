"""scripts.train with faults at chosen moments, for tests/test_faults.py:

    python -m tests.faulty step:30:SIGTERM save:1:SIGTERM -- --workdir=... --config=...

step:N:SIGNAL        a signal to this process while step N is computed
evaluation:N:SIGNAL  during its N-th evaluation
save:N:SIGNAL        while its N-th checkpoint is written
memory:MB            no more memory than so many megabytes above what it has when the model is made
clock:SECONDS        the wall clock is that far from the true one
"""

import itertools
import os
import resource
import signal
import sys
import threading
import time


def at(owner: type, method: str, number: int, then) -> None:
    """Calls `then` when `method` of `owner` is entered for the `number`-th time."""
    real, count = getattr(owner, method), itertools.count(1)

    def wrapped(*arguments):
        if next(count) == number:
            then()
        return real(*arguments)

    setattr(owner, method, wrapped)


def at_step(step: int, then) -> None:
    """Calls `then` when that step was dispatched and is not waited for yet."""
    from rope_lm import loop

    real = loop.Loop._log

    def wrapped(loop):
        if loop.done == step - 1 and not loop.stop:
            then()
        return real(loop)

    loop.Loop._log = wrapped


def arrange(fault: str) -> None:
    kind, _, rest = fault.partition(":")
    if kind == "clock":
        real = time.time
        time.time = lambda: real() + float(rest)
        return
    from rope_lm import checkpoint, loop

    if kind == "memory":
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
        limit = used + int(rest) * 10**6
        at(loop.Loop, "_validate", 1, lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
        return
    number, name = rest.split(":")
    kill = lambda: os.kill(os.getpid(), signal.Signals[name])  # noqa: E731
    if kind == "step":
        at_step(int(number), kill)
    elif kind == "evaluation":
        at(loop.Loop, "_validate", int(number), lambda: threading.Timer(0.0003, kill).start())
    elif kind == "save":
        at(checkpoint.Checkpoints, "_seal", int(number), kill)  # in the thread that waits for Orbax to write


if __name__ == "__main__":
    split = sys.argv.index("--")
    faults, sys.argv[1:] = sys.argv[1:split], sys.argv[split + 1 :]
    os.environ.setdefault("GLIBC_TUNABLES", "")  # the script would start itself again, without the faults
    for each in faults:
        arrange(each)
    from scripts import entry, train

    entry.start(train.main, train.__doc__)
