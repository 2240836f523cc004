"""scripts.train with faults at chosen moments, for tests/test_faults.py:

    python -m tests.faulty step:6:SIGTERM save:2:SIGTERM -- --workdir=... --config=...

step:N:SIGNAL        a signal to this process while step N is computed
evaluation:N:SIGNAL  during its N-th evaluation
save:N:SIGNAL        while its N-th checkpoint is written
memory:MB            that many megabytes of memory more than it has at the first evaluation, and no more
clock:SECONDS        a wall clock that is that far from the true one
"""

import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def at(owner: type, method: str, then: Callable[[Any, int], None]) -> None:
    """Call `then` with the object and the number of calls so far whenever `method` of `owner` is entered."""
    real, count = getattr(owner, method), itertools.count(1)

    def wrapped(self: Any, *arguments: Any) -> Any:
        then(self, next(count))
        return real(self, *arguments)

    setattr(owner, method, wrapped)


def limit_memory(megabytes: int) -> None:
    """Allow this process that much more memory than it has."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + megabytes * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def arrange(fault: str) -> None:
    """Arrange one of the faults above."""
    kind, number, *name = fault.split(":")
    if kind == "clock":
        real = time.time
        time.time = lambda: real() + float(number)
        return
    from rope_lm.checkpoint import Checkpoints
    from rope_lm.loop import Loop

    if kind == "memory":
        at(Loop, "_validate", lambda _, count: limit_memory(int(number)) if count == 1 else None)
        return
    fault_at = int(number)
    kill = partial(os.kill, os.getpid(), signal.Signals[name[0]])
    if kind == "step":  # its metrics are logged when the next one was dispatched
        at(Loop, "_log", lambda loop, _: kill() if loop.done == fault_at - 1 and not loop.stop else None)
    elif kind == "evaluation":
        at(Loop, "_validate", lambda _, count: threading.Timer(3e-4, kill).start() if count == fault_at else None)
    elif kind == "save":  # in the thread that waits for Orbax to write
        at(Checkpoints, "_seal", lambda _, count: kill() if count == fault_at else None)


if __name__ == "__main__":
    split = sys.argv.index("--")
    faults, sys.argv[1:] = sys.argv[1:split], sys.argv[split + 1 :]
    os.environ.setdefault("GLIBC_TUNABLES", "")  # the script would start itself again, without the faults
    for fault in faults:
        arrange(fault)
    from scripts import entry, train

    entry.start(train.main, train.__doc__)
