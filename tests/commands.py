"""Run the project's commands in processes of their own.

`call` starts Python anew. `Fork` saves the second or two that importing JAX takes: the process is a fork of one that
has imported it already. Its signals, exit status, files and standard streams are as real.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}


def call(*words: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `python -m` with these words to its end."""
    command = [sys.executable, "-m", *map(str, words)]
    environment = os.environ | ENVIRONMENT | (env or {})
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, timeout=300
    )


def _run(words: list[str], cwd: Path, env: dict[str, str], streams: list[str]) -> None:
    """Become `python -m` with these words."""
    for number, (name, mode) in enumerate(zip([os.devnull, *streams], [os.O_RDONLY, *2 * [os.O_WRONLY]], strict=True)):
        os.dup2(os.open(name, mode), number)
    # A script would start itself again to get huge pages, and lose what was imported.
    os.environ.update(ENVIRONMENT | {"GLIBC_TUNABLES": ""} | env)
    os.chdir(cwd)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


class Fork:
    """A command in a fork. Variables that JAX reads while it is imported cannot be changed by `env`."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])

    def __init__(self, *words: object, cwd: Path = ROOT, env: dict[str, str] | None = None):
        self._files = [tempfile.NamedTemporaryFile("r", suffix=name) for name in ("out", "err")]  # noqa: SIM115
        names = [file.name for file in self._files]
        self._process = self.context.Process(target=_run, args=(list(map(str, words)), cwd, env or {}, names))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end; return the exit status, negative for a signal."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s; stderr ends with {self.read()[1][-3000:]}")
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; return what was printed on stdout and on stderr."""
        self.wait(timeout)
        return self.read()

    def read(self) -> tuple[str, str]:
        """Return what was printed so far."""
        out, err = (Path(file.name).read_text() for file in self._files)
        return out, err


def fork(*words: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `python -m` with these words to its end, in a fork."""
    child = Fork(*words, cwd=cwd, env=env)
    out, err = child.communicate()
    return subprocess.CompletedProcess(list(map(str, words)), child.wait(), out, err)
