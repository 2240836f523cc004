"""Break the code in ten ways and see whether the tests notice; run by hand:

    python -m tests.mutations               # all ten
    python -m tests.mutations rotation t5   # some

Each mutation is made in a copy of the checkout. The tests nearest to it run first, then all default tests, then those
under --all. The table names the first test that failed, and what ran when it did.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.commands import ROOT


class Mutation(NamedTuple):
    """An error, as a replacement of text that stands exactly once in a file."""

    error: str
    file: str
    right: str
    wrong: str
    near: str  # the tests that should notice, with spaces between


MUTATIONS = {
    "rotation": Mutation(
        "the sign of one half of the rotation",
        "rope_lm/positional/rotary.py",
        "b * cos + a * sin]",
        "b * cos - a * sin]",
        "tests/positional/test_goldens.py",
    ),
    "causal": Mutation(
        "the causal mask of the blocked kernel one off",
        "rope_lm/kernels/softmax.py",
        "jnp.arange(keys.stop)[None, :] > jnp.arange(queries.start, queries.stop)[:, None]",
        "jnp.arange(keys.stop)[None, :] > 1 + jnp.arange(queries.start, queries.stop)[:, None]",
        "tests/kernels/test_softmax.py",
    ),
    "t5": Mutation(
        "a T5 bucket boundary one off",
        "rope_lm/positional/bias.py",
        "    exact = buckets // 2\n",
        "    exact = buckets // 2 - 1\n",
        "tests/positional/test_relative_bias.py tests/positional/test_goldens.py",
    ),
    "packing": Mutation(
        "packing that ignores segments",
        "rope_lm/positions.py",
        "same = self.q.segment[:, :, None] == self.k.segment[:, None, :]",
        "same = (self.q.segment[:, :, None] > 0) == (self.k.segment[:, None, :] > 0)",
        "tests/positional/test_laws.py",
    ),
    "cache": Mutation(
        "a cache position one off",
        "rope_lm/transformer.py",
        "return Positions(_append(old.index, index, cache.used),",
        "return Positions(_append(old.index, index + 1, cache.used),",
        "tests/positional/test_laws.py",
    ),
    "order": Mutation(
        "members that share one data order",
        "rope_lm/data/__init__.py",
        "batches.ensemble(self.train, self.batch, seeds, start, stop)",
        "batches.ensemble(self.train, self.batch, [seeds[0]] * len(seeds), start, stop)",
        "tests/data/test_batches.py tests/test_loop.py",
    ),
    "moment": Mutation(
        "a resume that drops the second moment",
        "rope_lm/checkpoint.py",
        "[found[name] for name in wanted]",
        '[found[name] * 0 if "/nu/" in name else found[name] for name in wanted]',
        "tests/test_checkpoint.py tests/test_faults.py",
    ),
    "sum": Mutation(
        "a checkpoint whose sum is not compared",
        "rope_lm/checkpoint.py",
        "if _sha256(folder / name) != known.get(name):",
        "if _sha256(folder / name) is None:",
        "tests/test_checkpoint.py",
    ),
    "student": Mutation(
        "Student's t with n degrees of freedom",
        "rope_lm/analysis/estimates.py",
        "half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)",
        "half = stats.t.ppf((1 + LEVEL) / 2, len(values))",
        "tests/analysis",
    ),
    "decay": Mutation(
        "weight decay on an encoding's own parameters",
        "rope_lm/positional/base.py",
        "axes=axes, decays=False)",
        "axes=axes, decays=True)",
        "tests/test_training.py",
    ),
}


def copy(folder: Path) -> None:
    """Copy what git tracks, and link the environment."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")


def first_failure(folder: Path, words: Iterable[str]) -> str | None:
    """Run pytest with these words until a test fails; return its name, None if none does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest {' '.join(words)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return None if done.returncode == 0 else failed.group(1) if failed else "?"


def caught(folder: Path, near: str) -> tuple[str, str]:
    """Return the first test that fails by default, and the first that fails under --all."""
    everything = ["-n", "auto", "--maxprocesses=4", "--dist=worksteal"]
    if found := first_failure(folder, near.split()) or first_failure(folder, everything):
        return found, found
    found = first_failure(folder, ["--all", *near.split()]) or first_failure(folder, ["--all", *everything])
    return "-", found or "-"


def main(names: list[str]) -> int:
    if unknown := set(names) - set(MUTATIONS):
        raise SystemExit(f"unknown mutation {', '.join(unknown)}: there are {', '.join(MUTATIONS)}")
    chosen = {name: MUTATIONS[name] for name in names or MUTATIONS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        near = sorted({path for mutation in chosen.values() for path in mutation.near.split()})
        if failure := first_failure(folder, near):
            raise SystemExit(f"{failure} fails without any mutation")
        rows = []
        for mutation in chosen.values():
            file = folder / mutation.file
            text = file.read_text()
            if text.count(mutation.right) != 1:
                raise SystemExit(f"{mutation.file} has {text.count(mutation.right)} times: {mutation.right}")
            file.write_text(text.replace(mutation.right, mutation.wrong))
            rows.append((mutation.error, *caught(folder, mutation.near)))
            file.write_text(text)
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    by_default, by_all = (sum(row[column] != "-" for row in rows) for column in (1, 2))
    print(f"{len(rows)} mutations: {by_default} caught by the default tests, {by_all} by --all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
