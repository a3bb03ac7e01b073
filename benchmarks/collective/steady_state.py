"""The engine in steady state: heap allocations and control messages per operation, idle CPU.

Allocations are those of the whole process, counted in malloc: on the thread that calls, and on all
others together (the engine's); of several counts the least. Heartbeats are off meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench

WARM_UPS, WINDOWS = 5, 3
SIZES = {"4 KiB": 4 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
MODEL = [1 << 24] + [4096] * 40  # Elements of the optimizer's parameters: 64 MiB and small ones.


class Counter:
    """What happens per repetition of something, by the counters of malloc and engine."""

    def __init__(self, rank: bench.Rank) -> None:
        self._rank = rank
        self._mallocs = ctypes.CDLL(None).bench_mallocs
        self._mallocs.restype = ctypes.c_long
        self.rows: dict[str, dict[str, float]] = {}

    def count(
        self, name: str, repeat: int, run: Callable[[int], Any], engine: Callable[[], list[int]]
    ) -> None:
        """``run(repeat)``, often: what every operation takes shows each time.

        Chance decides when a memory that is kept and used again has reached its size.
        """
        taken = []
        for _ in range(WARM_UPS + WINDOWS):
            self._rank.barrier()
            before = self._now(engine)
            run(repeat)
            self._rank.barrier()
            taken.append([(b - a) / repeat for a, b in zip(before, self._now(engine))])
        keys = ("caller", "other threads", "engine's own counter", "control messages")
        self.rows[name] = {k: min(seen) for k, seen in zip(keys, zip(*taken[WARM_UPS:]))}

    def _now(self, engine: Callable[[], list[int]]) -> list[int]:
        mine = self._mallocs(os.getpid())
        return [mine, self._mallocs(0) - mine, *engine()]


def count(rank: bench.Rank) -> dict[str, Any]:
    import torch

    rank.open(64 << 20)
    rank.join()
    counter = Counter(rank)

    def cpp() -> list[int]:
        return [rank.call("bench_engine_allocations"), rank.call("bench_control_messages")]

    for label, size in SIZES.items():
        repeat = 10 if size > 1 << 20 else 200
        n = size // 4
        out = torch.ones(n)
        places = {"private": torch.rand(n)}
        places["arena"] = rank.tensor(
            rank.native.bench_allocate(ctypes.c_int64(size)), n
        ).uniform_()
        for place, x in places.items():
            counter.count(
                f"C++ neighbor_allreduce, {label}, {place}",
                repeat,
                lambda k, x=x, out=out: rank.call("bench_averages", x, out, x.numel(), k),
                cpp,
            )
    x, g, v = ([torch.rand(n) for n in MODEL] for _ in range(3))
    rank.call("bench_optimizer", len(MODEL), MODEL)
    pointers = [bench._native(t) for t in (x, g, v)]
    counter.count(
        f"C++ DecentLaM step, {len(MODEL)} parameters",
        10,
        lambda k: rank.call("bench_step", *pointers, 0.01, 0.9, k),
        cpp,
    )
    rank.native.bench_leave()

    bf = rank.init()

    def python() -> list[int]:
        stats = bf.stats()
        return [stats["allocations"], stats["control_messages"]]

    def repeated(run: Callable[[], Any]) -> Callable[[int], None]:
        def loop(k: int) -> None:
            for _ in range(k):
                run()

        return loop

    for label, size in SIZES.items():
        x1 = torch.rand(size // 4)
        counter.count(
            f"Python neighbor_allreduce, {label}, private",
            10 if size > 1 << 20 else 200,
            repeated(lambda x1=x1: bf.neighbor_allreduce(x1)),
            python,
        )
    for t, gradient in zip(x, g):
        t.requires_grad_().grad = gradient
    optimizer = bf.optim.DecentLaM(x, lr=0.01, overlap=False)
    counter.count(
        f"Python DecentLaM step, {len(x)} parameters", 10, repeated(optimizer.step), python
    )
    bf.shutdown()
    return counter.rows


def idle(rank: bench.Rank, seconds: float, windows: int) -> list[float]:
    """Percent of one processor that this process uses while nothing is asked of it."""
    import torch

    bf = rank.init()
    for _ in range(20):
        bf.neighbor_allreduce(torch.rand(1 << 20))
        bf.neighbor_allreduce(torch.rand(16))
    shares = []
    for _ in range(windows):
        bf.barrier()
        begin, cpu = time.monotonic(), time.process_time()
        time.sleep(seconds)
        shares.append(100 * (time.process_time() - cpu) / (time.monotonic() - begin))
    bf.shutdown()
    return shares


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--idle-seconds", type=float, default=1.0, help="of each round")
    options = arguments.parse_args()
    bench.build()
    report = bench.Report("Steady state, 2 ranks, ring: per operation, the rank with the most")
    env = {"LD_PRELOAD": str(bench.LIBRARIES / "libbench_malloc.so"), **bench.QUIET_CONTROL}
    ranks = bench.launch(count, 2, env=env)
    for name in ranks[0]:
        for what in ranks[0][name]:
            values = [r[name][what] for r in ranks]
            engine = name.startswith("C++") or what != "caller"  # Python's own objects are allowed.
            report.value(f"{name}: {what}", [max(values)], "", at_most=0 if engine else None)
    settings = {"seconds": options.idle_seconds, "windows": options.rounds}
    for size in (2, 8):
        ranks = bench.launch(idle, size, arguments=settings)
        report.value(f"idle CPU, {size} ranks, rank 0", ranks[0], "%", at_most=1.0)
        others = [max(window) for window in zip(*ranks[1:])]
        report.value(f"idle CPU, {size} ranks, the busiest other", others, "%", at_most=1.0)
    report.print(options.json)


if __name__ == "__main__":
    main()
