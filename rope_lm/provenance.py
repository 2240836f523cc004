"""Where a run comes from: the command, the code, the packages and the machine."""

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rope_lm import environment

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "ml-collections",
    "numpy",
)


def provenance(argv: Sequence[str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's entries on the command, the code and the machine.

    `overrides` are the config values that flags have set, by dotted key. `commit` and `diff` are empty outside a git
    checkout.
    """
    diff = _git("diff", "HEAD")
    return {
        "commit": _git("rev-parse", "HEAD").decode().strip(),
        "diff": hashlib.sha256(diff).hexdigest() if diff else "",
        "argv": list(argv),
        "overrides": json.loads(json.dumps(overrides, default=str)),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "environment": environment.recorded(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def _git(*arguments: str) -> bytes:
    """Return the output of git in this checkout; nothing if this is no checkout or git is missing."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return b""
    try:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
