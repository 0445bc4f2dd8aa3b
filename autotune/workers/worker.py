"""Candidates run in a process of their own: a crash, a hang or a leak costs one candidate.

The process is started anew, never forked (a forked copy of a process that has compiled may deadlock), and by
its command, not through ``multiprocessing``: so a script needs no ``if __name__ == "__main__"``, and tuning
works inside daemonic processes. It is replaced after a number of candidates, since what a compiler leaks is
never given back, and when it dies or exceeds its time. It ends with its parent, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO

from convsched.autotune.workers.candidate import Job, Outcome
from convsched.errors import ConvschedError

COMPILED = "compiled"
JOBS_PER_PROCESS = 200
TIMEOUT_SECONDS = 60.0  # seconds of a job
END_SECONDS = 5.0  # that a process which has closed its connection may take to end

# The parent's search path, so that the process imports the same files. Ctrl-C reaches all processes of a
# terminal, and this one is the parent's to stop.
_COMMAND = """\
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = {path!r}
from {module} import main
main({descriptor})
"""


class WorkerError(ConvschedError):
    """A worker process that cannot be started."""


class Worker:
    """A process that runs jobs one at a time; started at the first job, replaced when needed."""

    def __init__(self, timeout: float = TIMEOUT_SECONDS, module: str = __name__) -> None:
        """``timeout``: seconds a job may take; ``module``: whose ``main`` the process runs."""
        self.timeout = timeout
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._errors: IO[bytes] | None = None
        self._open = contextlib.ExitStack()
        self._is_ready = False
        self._jobs = 0

    @property
    def pid(self) -> int | None:
        """The process's number; None where there is none."""
        return self._process.pid if self._process else None

    def run(self, job: Job, timeout: float | None = None, meanwhile: Callable[[], bool] = lambda: False) -> Outcome:
        """Run a job; a worker that dies, or takes more than its ``timeout`` in seconds to compile or to time it,
        is an outcome, not an error. ``meanwhile`` is called again and again while the worker compiles, as long as
        it says that there is more to do. Raises WorkerError where no process can be started."""
        if self._jobs >= JOBS_PER_PROCESS:
            self.close()
        self.start()
        seconds = self.timeout if timeout is None else min(timeout, self.timeout)
        try:
            self._wait_until_ready()
            assert self._connection is not None
            self._jobs += 1
            self._connection.send(job)
            while not self._connection.poll() and meanwhile():
                pass
            while self._connection.poll(seconds):
                answer = self._connection.recv()
                if isinstance(answer, Outcome):
                    return answer
            self.close()
            return Outcome("timed out", f"no answer in {seconds:g} s")
        except (EOFError, BrokenPipeError, ConnectionResetError):
            how = self._end()
            self.close()
            return Outcome("crashed", f"the process {how}")
        except BaseException:
            self.close()  # its answer to this job must not be taken for that to the next
            raise

    def start(self) -> None:
        """Start a process, unless there is one; the first job then waits less for it. Raises WorkerError."""
        if self._process is not None:
            return
        ours, theirs = Pipe()
        self._connection = self._open.enter_context(ours)
        # What the compiler says before it aborts; closed with the connection.
        self._errors = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        code = _COMMAND.format(path=sys.path, module=self._module, descriptor=theirs.fileno())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=self._errors, pass_fds=(theirs.fileno(),))
        except OSError as error:
            self.close()
            raise WorkerError(f"the process that runs candidates cannot be started: {error}") from error
        finally:
            theirs.close()
        self._jobs, self._is_ready = 0, False

    def _wait_until_ready(self) -> None:
        """Wait until the process has imported the compiler, which no job's time is to include."""
        if self._is_ready:
            return
        assert self._connection is not None
        how = f"was not ready in {self.timeout:g} s"
        try:
            if self._connection.poll(self.timeout):
                self._connection.recv()
                self._is_ready = True
                return
        except (EOFError, ConnectionResetError):
            how = self._end()
        self.close()
        raise WorkerError(f"the process that runs candidates {how}; {sys.executable} -c "
                          f"'import {self._module}' shows more")

    def _end(self) -> str:
        """How the process, which has closed its connection, ended; with the last line that it wrote."""
        assert self._process is not None
        assert self._errors is not None
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its connection and went on"
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with {code}"
        self._errors.seek(0)
        lines = self._errors.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
        return f"{how}: {lines[-1].strip()}" if lines else how

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._open.close()
        self._process = self._connection = self._errors = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main(descriptor: int) -> None:
    """The process's loop: a job in, COMPILED and its outcome out, until the other end closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from convsched.autotune.workers import candidate

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), Connection(descriptor) as connection:
        connection.send("ready")
        while True:
            connection.send(candidate.run_job(connection.recv(), partial(connection.send, COMPILED)))


def _end_with_parent() -> None:
    """Nothing is written to standard input, which ends when the parent does: a job may run on for hours."""
    os.read(0, 1)
    os._exit(1)
