"""Signals that ask a process to stop soon: it then saves and exits with status STOPPED."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPPED = 75  # exit status of a process that was asked to stop and can go on
# Schedulers send SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU before they kill; a terminal that closes sends SIGHUP.
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def answer(handle: Callable[[int], object]) -> dict[int, Any]:
    """Install `handle`, called with the signal's number, for every signal in STOP; return the previous handlers.

    SIGHUP stays ignored if it was, as under nohup.
    """
    before: dict[int, Any] = {}
    for number in STOP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, _: handle(number))
    return before


@contextmanager
def answered(handle: Callable[[int], object]) -> Iterator[None]:
    """Install `handle` as `answer` does, within a context."""
    before = answer(handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
