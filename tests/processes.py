"""`loralab ...` in a process of its own, forked from a server that has imported the libraries already.

It has its own process id, streams, folder and end, by exit or by signal, as one that a shell starts; but it is there at
once, and not after the seconds of importing. So are the runs that a comparison starts (`ForkedRun`); that they can also be
started from nothing is tested in test_foreign_code.py and test_public_names.py.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preload"])
STREAMS = Path(tempfile.mkdtemp(prefix="loralab-tests-"))
atexit.register(shutil.rmtree, STREAMS, ignore_errors=True)


class Process:
    """One command at work. `wait` gives its end, `output` and `errors` what it has written so far."""

    def __init__(
        self, place: Path, arguments: tuple[str, ...], file_size: int | None = None, without: tuple[str, ...] = ()
    ) -> None:
        """
        Args:
            file_size: bytes that no file may exceed, which stands for a full disk.
            without: namespaces of torch.ops that are empty, as in a build of PyTorch that lacks their operations.
        """
        number = len(os.listdir(STREAMS))
        self._files = STREAMS / f"{number} stdout", STREAMS / f"{number} stderr"
        for file in self._files:
            file.touch()
        given = (dict(os.environ), self._files, file_size, without)
        _start_server()
        self._process = SERVER.Process(target=_run, args=(place, arguments, *given), daemon=True)
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> int:
        """The exit code; of one that a signal ended, the signal's number with a minus."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    @property
    def output(self) -> str:
        return self._files[0].read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        return self._files[1].read_text(encoding="utf-8")


def _start_server() -> None:
    """Starts the server where it is not running. It finds preload.py by PYTHONPATH alone: Python 3.11 does not hand on sys.path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def wait_for_step(process: Process, log: Path, step: int) -> None:
    """Until metrics.jsonl has more than this many lines, or the process has ended."""
    while process.running() and not (log.exists() and log.read_bytes().count(b"\n") > step):
        time.sleep(0.005)


def _run(
    place: Path,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    streams: tuple[Path, Path],
    file_size: int | None,
    without: tuple[str, ...],
) -> None:
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((0, os.devnull), (1, streams[0]), (2, streams[1])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if without:
        import torch

        for namespace in without:
            setattr(torch.ops, namespace, SimpleNamespace())
    sys.stdin = open(0, encoding="utf-8")  # multiprocessing has closed it  # noqa: SIM115
    from loralab.experiments import run_variants

    run_variants.subprocess = SimpleNamespace(Popen=ForkedRun, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    _command(arguments)


def _command(arguments: Sequence[str]) -> None:
    sys.argv = ["loralab", *arguments]
    from loralab.cli import main

    main()


class ServedRun(Process):
    """In the place of `subprocess.Popen` for a command of loralab that a test itself starts: a fork of the server."""

    def __init__(self, command: Sequence[str], stdout: int) -> None:
        assert stdout == subprocess.DEVNULL
        super().__init__(Path.cwd(), tuple(command[command.index("loralab") + 1 :]))

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)


class ForkedRun:
    """In the place of `subprocess.Popen` for a command of loralab: a fork of this process, which has imported everything."""

    def __init__(self, command: Sequence[str], stdout: int) -> None:
        assert stdout == subprocess.DEVNULL
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _command(command[command.index("loralab") + 1 :])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> int:
        """Returns the exit code; of a process that a signal ended, the signal's number with a minus."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
