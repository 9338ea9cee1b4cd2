"""Python programs as forks of a process that has imported everything: none waits for torch.

    done = run(["-m", "pipeline", "inspect", "digits.zarr"], cwd=folder)

Real processes otherwise: they have a working directory, an environment, files as stdout and
stderr, they can be killed, and they end with an exit code. What is tested of imports themselves, of
torchrun or of the interpreter's own options needs `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = [
    "torch",
    "torchvision.transforms.v2",
    "dask.distributed",
    "pipeline.cli",
    "pipeline.tables",
    "stages.cache_teacher",
    "stages.evaluate",
    "stages.rectify",
    "stages.repair",
    "stages.train_student",
    "stages.train_teacher",
    "stages.verify",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Started:
    """A program that runs. words: what would follow `python`: -m MODULE, -c CODE or FILE, ..."""

    def __init__(
        self,
        words: Sequence[str],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.words = [*map(str, words)]
        self._folder = Path(tempfile.mkdtemp(prefix="fork-"))
        where, what = str(cwd or Path.cwd()), dict(os.environ if env is None else env)
        self._process = _context.Process(
            target=_play, args=(self.words, where, what, self._folder), daemon=False
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._written("out")

    @property
    def stderr(self) -> str:
        return self._written("err")

    def _written(self, name: str) -> str:
        file = self._folder / name
        return file.read_text() if file.exists() else ""

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 120) -> int:
        """Its exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr


def run(
    words: Sequence[str],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Raises subprocess.TimeoutExpired, and kills it then."""
    started = Started(words, cwd, env)
    try:
        code = started.wait(timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        raise
    return subprocess.CompletedProcess(started.words, code, started.stdout, started.stderr)


def start_ranks(words: Sequence[str], world: int) -> list[Started]:
    """What torchrun does, without its start-up: a program on so many ranks that know each other."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    every = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        Started(words, env=os.environ | every | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(world))
    ]


def _play(words: list[str], cwd: str, env: dict[str, str], folder: Path) -> None:
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
    sys.path[:0] = [part for part in env.get("PYTHONPATH", "").split(os.pathsep) if part]
    match words:
        case ["-m", module, *arguments]:
            sys.path.insert(0, cwd)
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *arguments]:
            sys.path.insert(0, cwd)
            sys.argv = ["-c", *arguments]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), main.__dict__)
        case [file, *arguments]:
            sys.path.insert(0, str(Path(file).parent))
            sys.argv = [file, *arguments]
            runpy.run_path(file, run_name="__main__")
