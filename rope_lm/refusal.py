"""Refusals: one-line errors for mistakes that a user can correct, raised before anything compiles."""

import difflib
from collections.abc import Iterable


class Refusal(Exception):
    """A user's mistake. Its message is one line: what was given, what is allowed, what to do.

    It is not a ValueError, because the libraries that read flags catch those and print a traceback.
    """


def unknown(what: str, given: str, allowed: Iterable[str]) -> Refusal:
    """Return the Refusal for a name that is not in a table, with the nearest names (at most three) first.

    >>> str(unknown("position", "rotry", ["none", "rotary"]))
    "unknown position 'rotry': did you mean rotary? (allowed: none, rotary)"
    """
    allowed = sorted(allowed)
    nearest = difflib.get_close_matches(given, allowed, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    shown = ", ".join(allowed) if len(allowed) <= 40 else f"{len(allowed)} names"
    return Refusal(f"unknown {what} {given!r}: {hint}(allowed: {shown})")
