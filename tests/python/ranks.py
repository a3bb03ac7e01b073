"""Runs test functions on several ranks.

``@on_ranks(4)`` makes a test whose body runs on each of four processes; the processes are started
once and used by all such tests. ``run_script`` starts processes for one script.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT = 60.0


def free_port() -> int:
    """Below the ports that the kernel gives to outgoing connections, which come and go."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            port = random.randrange(10_240, 32_000)
            s.bind(("127.0.0.1", port))
            return port


def environments(n: int, **extra: str) -> list[dict[str, str]]:
    """What the launcher sets for each of ``n`` ranks."""
    job, port = uuid.uuid4().hex, free_port()
    common = {k: v for k, v in os.environ.items() if not k.startswith("BLUEFOG_")}
    common.update(_settings(extra))
    if n == 1:
        return [common]
    return [
        {
            **common,
            "BLUEFOG_RANK": str(rank),
            "BLUEFOG_SIZE": str(n),
            "BLUEFOG_LOCAL_RANK": str(rank),
            "BLUEFOG_LOCAL_SIZE": str(n),
            "BLUEFOG_JOB_ID": job,
            "BLUEFOG_COORDINATOR": f"127.0.0.1:{port}",
        }
        for rank in range(n)
    ]


def _settings(extra: dict[str, str]) -> dict[str, str]:
    ours = {"OMP_NUM_THREADS": "1", "BLUEFOG_LOG_LEVEL": "warn", "PYTHONPATH": _python_path()}
    return {**ours, **extra}


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))


class Job:
    """``n`` processes that run a script, or the worker loop below without one.

    With ``lab`` (of ``tests/net/lab.py``) they run on its hosts.
    """

    def __init__(self, n: int, script: str | None = None, lab: Any = None, **extra: str) -> None:
        self.n = n
        self._errors = [tempfile.TemporaryFile("w+") for _ in range(n)]  # noqa: SIM115
        command = [sys.executable, "-u", str(HERE / "ranks.py")]
        if script is not None:
            command = [sys.executable, "-u", "-c", "import faulthandler, signal\n"
                       "faulthandler.register(signal.SIGUSR1)\n" + script]  # fmt: skip
        if lab is None:
            starts = [(command, env) for env in environments(n, **extra)]
        else:
            places = lab.places(**_settings(extra))
            starts = [(lab.command(p.host, command), p.env) for p in places]
        self.processes = [
            subprocess.Popen(
                started,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for (started, env), errors in zip(starts, self._errors)
        ]

    def errors(self, rank: int) -> str:
        self._errors[rank].seek(0)
        return self._errors[rank].read()

    def call(self, path: str, function: str) -> None:
        """Runs a function on all ranks; AssertionError if it fails on one or takes too long."""
        request = json.dumps({"path": path, "function": function}) + "\n"
        for p in self.processes:
            p.stdin.write(request)
            p.stdin.flush()
        failures = []
        deadline = time.monotonic() + TIMEOUT
        for rank, p in enumerate(self.processes):
            answer = self._read_line(p, deadline)
            if answer is None:
                now = time.monotonic()
                for r in range(rank + 1, self.n):
                    failures.append(f"-- rank {r} {self._read_line(self.processes[r], now + 0.2)}")
                self.kill()
                raise AssertionError(
                    f"{function}: no answer from rank {rank}\n{failures}\n"
                    + "\n".join(f"-- rank {r}\n{self.errors(r)[-3000:]}" for r in range(self.n))
                )
            result = json.loads(answer)
            if result["error"]:
                failures.append(f"-- rank {rank}\n{result['error']}")
        if failures:
            self.kill()  # The next test gets fresh ones.
            raise AssertionError(f"{function} failed\n" + "\n".join(failures))

    def wait(self, timeout: float = TIMEOUT) -> list[subprocess.CompletedProcess]:
        """The ends of all processes; those alive at the time-out print their stacks and die."""
        deadline = time.monotonic() + timeout
        results = []
        for rank, p in enumerate(self.processes):
            try:
                out, _ = p.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
                stacks = "\n".join(f"-- rank {r}\n{self.errors(r)}" for r in range(self.n))
                raise AssertionError(f"rank {rank} did not end\n{stacks}") from None
            results.append(
                subprocess.CompletedProcess(p.args, p.returncode, out, self.errors(rank))
            )
        return results

    @property
    def alive(self) -> bool:
        return all(p.poll() is None for p in self.processes)

    def kill(self) -> None:
        for p in self.processes:
            if p.poll() is None:
                p.send_signal(signal.SIGUSR1)  # Prints the stacks.
        time.sleep(0.3)
        for p in self.processes:
            p.kill()
            p.wait()

    def close(self) -> None:
        """Ends a worker job in the ordinary way: the scripts' end."""
        for p in self.processes:
            p.stdin.close()
        for p in self.processes:
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()

    @staticmethod
    def _read_line(p: subprocess.Popen, deadline: float) -> str | None:
        import select

        while time.monotonic() < deadline:
            if select.select([p.stdout], [], [], 0.2)[0]:
                return p.stdout.readline() or None
            if p.poll() is not None:
                return None
        return None


_jobs: dict[tuple, Job] = {}


def job(n: int, **extra: str) -> Job:
    """The shared worker processes of a size, with these variables in their environment."""
    key = (n, *sorted(extra.items()))
    if key not in _jobs or not _jobs[key].alive:
        _jobs[key] = Job(n, **extra)
    return _jobs[key]


def close_jobs() -> None:
    for j in _jobs.values():
        j.close()
    _jobs.clear()


def on_ranks(n: int, **extra: str):
    """Decorates a test whose body runs on each of ``n`` ranks, after ``bf.init()``.

    ``extra``: variables of their environment.
    """

    def decorate(function):
        @functools.wraps(function)
        def test():
            job(n, **extra).call(function.__code__.co_filename, function.__name__)

        # The body is for the workers; pytest must not look through to its signature.
        test.body = function
        del test.__wrapped__
        return test

    return decorate


def told(call, *texts, kind=ValueError):
    """The message of the error that ``call`` raises, after a look at what it must contain."""
    import pytest

    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    for text in texts:
        assert text in message, f"{text!r} is not in {message!r}"
    return message


def answers_ctrl_c(script: str) -> None:
    """Rank 0 of 2 prints "waiting", waits, and "interrupted" within 200 ms of a SIGINT.

    Rank 1 may wait for the end of its standard input. The best of three tries counts: the machine
    may be busy, and what would fail is a wait of seconds.
    """
    times = []
    while len(times) < 3:
        job = Job(2, script)
        zero = job.processes[0]
        deadline = time.monotonic() + TIMEOUT
        assert job._read_line(zero, deadline) == "waiting\n", job.errors(0)
        time.sleep(0.3)  # Into the wait; too early would only make the test easier.
        start = time.monotonic()
        zero.send_signal(signal.SIGINT)
        answer = job._read_line(zero, deadline)
        times.append(time.monotonic() - start)
        for p in job.processes:
            p.stdin.close()
            p.wait(20)
        job.kill()
        assert answer == "interrupted\n", job.errors(0)
        if times[-1] < 0.2:
            return
    raise AssertionError(f"answered after {times} s")


def run_script(n: int, script: str, timeout: float = TIMEOUT, **extra: str):
    """Runs Python source on ``n`` ranks to its end."""
    return Job(n, script, **extra).wait(timeout)


def _work() -> None:
    faulthandler.register(signal.SIGUSR1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What tests print does not mix with the answers.
    modules = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"error": None}
        try:
            import bluefog

            path = request["path"]
            if path not in modules:
                spec = importlib.util.spec_from_file_location(Path(path).stem, path)
                modules[path] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[path])
            bluefog.init()
            getattr(modules[path], request["function"]).body()
        except BaseException:
            answer["error"] = traceback.format_exc()
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    _work()
