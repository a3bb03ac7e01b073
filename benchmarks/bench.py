"""What the benchmarks share: building, processes for the ranks, rounds in turn, ratios, the report.

A script calls ``launch(body, ranks, ...)``: ``body(rank, ...)`` runs in the process of every rank,
and what it returns comes back. A body that times things gives ``measure`` a list of ``Series``,
which run in turn, round by round; ``Report`` makes ratios of them. This file is also the program
that the processes of the ranks run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "net"))

from lab import Lab, LabError, watch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "release"
LIBRARIES = BUILD / "lib"
# Of the C++ interface's job in a lab; that of the Python module has another.
LAB_PORT = 19_000
CORES = len(os.sched_getaffinity(0))
# A control plane that says nothing by itself for as long as a script runs.
QUIET_CONTROL = {
    "BLUEFOG_HEARTBEAT_MS": "600000",
    "BLUEFOG_SUSPECT_MS": "1200000",
    "BLUEFOG_DEAD_MS": "1800000",
}


# ---- In the script's process.


def parser(description: str | None, rounds: int = 9) -> argparse.ArgumentParser:
    """Arguments that every script takes."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help="rounds in turn (%(default)s)")
    made.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    return made


def build(*more: str) -> None:
    """The Release build: library, Python module, what the scripts load, and ``more``."""
    targets = ["bench_native", "bench_malloc", "bluefog_tool", "_core", *more]
    configure = ["cmake", "--preset", "release", "-DBLUEFOG_PYTHON=ON", "-DBLUEFOG_BENCHMARKS=ON"]
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    if not (BUILD / "build.ninja").exists() or not (BUILD / "python").exists():
        _run(configure)
    _run(["cmake", "--build", str(BUILD), "--target", *targets])
    if shutil.which("mpirun"):
        subprocess.run(  # Where CMake did not find MPI's headers there is no such target.
            ["cmake", "--build", str(BUILD), "--target", "bench_mpi"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def has_mpi() -> bool:
    return shutil.which("mpirun") is not None and (LIBRARIES / "libbench_mpi.so").exists()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def _free_address() -> str:
    while True:
        # Below the ports that the kernel gives to outgoing connections.
        address = ("127.0.0.1", random.randrange(10_240, 32_000))
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(address)
            return "{}:{}".format(*address)


@contextlib.contextmanager
def network(hosts: int, ranks_per_host: int = 1, rate: str = "1gbit") -> Iterator[Lab]:
    """Hosts on shaped links, for ``launch``; ends the script where this machine makes none."""
    try:
        with Lab(hosts, ranks_per_host, rate) as lab:
            yield lab
    except LabError as e:
        sys.exit(str(e))


def launch(
    body: Callable[..., Any],
    ranks: int,
    *,
    mpi: bool = False,
    lab: Lab | None = None,
    env: dict[str, str] | None = None,
    arguments: dict[str, Any] | None = None,
) -> list[Any]:
    """What ``body(rank, **arguments)`` returns on every rank.

    Under mpirun, ``bluefog run`` or, with ``lab``, on its hosts.
    """
    # A SIGTERM takes the folder away too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bluefog-bench-") as folder:
        (Path(folder) / "area").touch()
        (Path(folder) / "arguments.json").write_text(json.dumps(arguments or {}))
        command = [sys.executable, __file__, body.__code__.co_filename, body.__name__, folder]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(BUILD / "python"), str(ROOT / "benchmarks")]),
            "OMP_NUM_THREADS": str(max(1, CORES // ranks)),
            "BLUEFOG_LOG_LEVEL": "warn",
            "BENCH_COORDINATOR": _free_address(),
            **(env or {}),
        }
        if lab is not None:
            environment["BENCH_COORDINATOR"] = f"{lab.hosts[0].ipv4}:{LAB_PORT}"
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            job = lab.start(command, env=environment, stdin=subprocess.DEVNULL, **pipes)
            if code := watch(job):
                sys.exit(code)
            return [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(ranks)]
        if mpi:
            environment.update(
                BLUEFOG_SIZE=str(ranks),
                BLUEFOG_LOCAL_SIZE=str(ranks),
                BLUEFOG_JOB_ID=uuid.uuid4().hex,
                BLUEFOG_COORDINATOR=_free_address(),
            )
            start = ["mpirun", "-np", str(ranks), "--bind-to", "none", "--oversubscribe"]
            start += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        else:
            start = [str(BUILD / "tools" / "bluefog"), "run", "-np", str(ranks)]
        code = subprocess.run([*start, *command], env=environment).returncode
        if code != 0:
            sys.exit(code)
        return [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(ranks)]


# ---- In the process of a rank.


class Rank:
    """This process's place, the native library and the barrier."""

    def __init__(self, folder: str) -> None:
        if "OMPI_COMM_WORLD_RANK" in os.environ:
            rank = os.environ["OMPI_COMM_WORLD_RANK"]
            os.environ.update(BLUEFOG_RANK=rank, BLUEFOG_LOCAL_RANK=rank)
        self.rank = int(os.environ["BLUEFOG_RANK"])
        self.size = int(os.environ["BLUEFOG_SIZE"])
        self.folder = folder
        self.native = ctypes.CDLL(str(LIBRARIES / "libbench_native.so"))
        self.native.bench_error.restype = ctypes.c_char_p
        self.native.bench_tensor.restype = ctypes.c_void_p
        self.native.bench_allocate.restype = ctypes.c_void_p

    def call(self, function: str, *args: Any) -> int:
        """A function of the native library that returns a time, or -1. Tensors become pointers."""
        return self._call(self.native, function, *args)

    def _call(self, library: Any, function: str, *args: Any) -> int:
        f = getattr(library, function)
        f.restype = ctypes.c_int64
        result = f(*[_native(a) for a in args])
        if result < 0:
            raise RuntimeError(f"{function}: {self.native.bench_error().decode()}")
        return result

    def open(self, bytes_per_tensor: int, blocked: bool = False) -> None:
        """Map the ranks' common memory: needed for the barrier and everything that is timed.

        ``blocked``: who waits at the barrier sleeps, and takes no core from those still at work.
        """
        area = str(Path(self.folder) / "area").encode()
        self.call("bench_open", area, self.rank, self.size, bytes_per_tensor, int(blocked))

    def join(self, names: int = 0) -> None:
        """Join with the C++ interface, in a job of its own."""
        self.call("bench_join", os.environ["BENCH_COORDINATOR"].encode(), b"bench", names)

    def init(self) -> Any:
        """bluefog.torch, joined, on a ring."""
        import bluefog.torch as bf

        bf.init(bf.topology.ring)
        return bf

    def mpi_init(self) -> None:
        self._mpi = ctypes.CDLL(str(LIBRARIES / "libbench_mpi.so"))
        self.mpi("bench_mpi_init")

    def mpi(self, function: str, *args: Any) -> int:
        return self._call(self._mpi, function, *args)

    def tensor(self, pointer: int, count: int) -> Any:
        """A float32 torch tensor over native memory."""
        import torch

        return torch.frombuffer((ctypes.c_float * count).from_address(pointer), dtype=torch.float32)

    def barrier(self) -> None:
        self.native.bench_barrier()


def _native(value: Any) -> Any:
    if hasattr(value, "data_ptr"):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, list) and value and hasattr(value[0], "data_ptr"):
        return (ctypes.c_void_p * len(value))(*[t.data_ptr() for t in value])
    if isinstance(value, list):
        return (ctypes.c_int64 * len(value))(*value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


@dataclass
class Series:
    """One thing that is timed.

    ``run`` is timed from a barrier on; if ``native``, it meets at the barrier itself and returns
    its time. ``prepare`` (poisons outputs, restores inputs) and ``check``, which is given what
    ``run`` returned and says whether the values are right, are not timed.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], None] | None = None
    check: Callable[[Any], bool] | None = None
    native: bool = False


def measure(
    rank: Rank, series: list[Series], rounds: int, iterations: int, check_each: bool = True
) -> dict[str, Any]:
    """Nanoseconds of every iteration, by series and round, and how the machine was.

    That is what else ran, and the time of a barrier: it tells whether virtual cores share a cache.

    Every round begins with another series. The first iteration of each is not counted: it meets
    caches full of another's data. ``check_each=False``: outputs are poisoned before and checked
    after the iterations of a round as a whole.
    """
    times: dict[str, list[list[int]]] = {s.name: [] for s in series}
    barriers: list[float] = []
    begin = (_machine_busy(), _own_cpu(), time.monotonic())
    for round_ in range(-1, rounds):  # Round -1 warms up.
        barriers.append(rank.call("bench_barriers", 1000) / 1e6)
        first = round_ % len(series)
        for s in series[first:] + series[:first]:
            samples = [_once(rank, s, check_each or i < 0) for i in range(-1, iterations)]
            if s.check is not None and not check_each:
                _once(rank, s, True)
            if round_ >= 0:
                times[s.name].append(samples[1:])
            else:
                begin = (_machine_busy(), _own_cpu(), time.monotonic())
    return {
        "times": times,
        "barrier_us": barriers,
        "busy": _machine_busy() - begin[0],
        "cpu": _own_cpu() - begin[1],
        "seconds": time.monotonic() - begin[2],
    }


def _once(rank: Rank, s: Series, checked: bool) -> int:
    if s.prepare is not None and checked:
        s.prepare()
    if s.native:
        result: Any = s.run()
        ns = result
    else:
        rank.barrier()
        start = time.perf_counter_ns()
        result = s.run()
        ns = time.perf_counter_ns() - start
    if checked and s.check is not None and not s.check(result):
        raise AssertionError(f"{s.name}: wrong values on rank {rank.rank}")
    return ns


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _machine_busy() -> float:
    """Seconds that the processors of the machine have been busy since it started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    ticks = sum(int(f) for i, f in enumerate(fields) if i not in (3, 4))  # Idle, waits for a disk.
    return ticks / os.sysconf("SC_CLK_TCK")


# ---- The report.


@dataclass
class Report:
    """Figures of one script: prints them and writes them as JSON."""

    title: str
    rows: dict[str, Any] = field(default_factory=dict)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    foreign: float | None = None
    _rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, ranks: list[dict[str, Any]]) -> None:
        """What ``measure`` returned on every rank. The time of an iteration is the slowest's."""
        for name in ranks[0]["times"]:
            rounds = [
                [max(ns) / 1e3 for ns in zip(*[r["times"][name][i] for r in ranks])]
                for i in range(len(ranks[0]["times"][name]))
            ]
            every = sorted(t for r in rounds for t in r)
            self._rounds[name] = [statistics.median(r) for r in rounds]
            self.rows[name] = {
                "p50_us": statistics.median(every),
                "p90_us": every[round(0.9 * (len(every) - 1))],
                "min_us": every[0],
                "max_us": every[-1],
            }
        self.value("a barrier", ranks[0]["barrier_us"], "us")
        own = sum(r["cpu"] for r in ranks)
        capacity = ranks[0]["seconds"] * CORES
        self.foreign = min(1.0, max(0.0, (ranks[0]["busy"] - own) / capacity))

    def ratio(
        self, a: str, b: str, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Time of ``a`` by time of ``b``, round by round, beside its target if there is one."""
        if a in self._rounds and b in self._rounds:
            values = [x / y for x, y in zip(self._rounds[a], self._rounds[b])]
            self.value(f"{a} ÷ {b}", values, "", at_most, at_least)

    def limit(
        self,
        name: str,
        limit: str,
        us: float,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Time of ``name`` by a limit that is computed."""
        if name in self._rounds:
            values = [t / us for t in self._rounds[name]]
            self.value(f"{name} ÷ {limit}", values, "", at_most, at_least)

    def time(self, name: str, at_most: float | None) -> None:
        """The median time, round by round."""
        self.value(f"{name}, p50", self._rounds[name], "us", at_most)

    def difference(self, a: str, b: str, at_most: float) -> None:
        """Microseconds that ``a`` takes more than ``b``."""
        values = [x - y for x, y in zip(self._rounds[a], self._rounds[b])]
        self.value(f"{a} − {b}", values, "us", at_most)

    def value(
        self,
        name: str,
        values: list[float],
        unit: str,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Some other figure; ``values`` by round."""
        median = statistics.median(values)
        row: dict[str, Any] = {"what": name, "median": median, "unit": unit}
        row |= {"min": min(values), "max": max(values), "rounds": values}
        if at_most is not None:
            row |= {"target": f"≤ {at_most:g}", "met": median <= at_most}
        elif at_least is not None:
            row |= {"target": f"≥ {at_least:g}", "met": median >= at_least}
        self.ratios.append(row)

    def print(self, json_file: str | None = None) -> None:
        print(self.title)
        if self.rows:
            print(f"{'':46} {'p50 us':>11} {'p90 us':>11} {'min us':>11} {'max us':>11}")
        for name, row in self.rows.items():
            print(f"{name:46}" + "".join(f" {row[k]:11.1f}" for k in row))
        for row in self.ratios:
            spread = f"{row['median']:.3g}{row['unit'] and ' ' + row['unit']}"
            spread += f" ({row['min']:.3g} … {row['max']:.3g})"
            verdict = ""
            if "met" in row:
                verdict = f"target {row['target']}: {'met' if row['met'] else 'missed'}"
            print(f"{row['what']:78} {spread:28} {verdict}".rstrip())
        if self.foreign is not None:
            print(f"foreign share of the processors: {self.foreign:.0%}")
        if json_file:
            figures = {"title": self.title, "series": self.rows, "ratios": self.ratios}
            figures["foreign_cpu_share"] = self.foreign
            Path(json_file).write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def _main() -> None:
    script, body, folder = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rank = Rank(folder)
    arguments = json.loads((Path(folder) / "arguments.json").read_text())
    result = getattr(module, body)(rank, **arguments)
    (Path(folder) / f"{rank.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
