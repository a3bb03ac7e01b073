"""A small average beside a large one on the same link, and what waiting for the network costs.

2 hosts at 1 Gb/s. While a large tensor is under way, averages of 4 KiB are made one after the
other. Then one rank waits for an average that the other begins only seconds later: the processor
time it needs meanwhile.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
from net.common import RATE

SMALL = 4 << 10


def body(rank: bench.Rank, size: int, rounds: int, wait: float) -> dict[str, list[float]]:
    import torch

    rank.open(64, blocked=True)
    bf = rank.init()
    small, large = torch.rand(SMALL // 4), torch.rand(size // 4)
    alone, beside, whole, cpu = [], [], [], []

    def once() -> float:
        begin = time.perf_counter()
        bf.neighbor_allreduce(small, name="small")
        return (time.perf_counter() - begin) * 1e3

    for round_ in range(-1, rounds):
        rank.barrier()
        quiet = statistics.median(once() for _ in range(20))
        rank.barrier()
        begin = time.perf_counter()
        handle = bf.neighbor_allreduce_nonblocking(large, name="large")
        # All ranks must make equally many: about as long as the large one takes.
        busy = [once() for _ in range(30)]
        under_way = not bf.poll(handle)
        bf.synchronize(handle)
        took = (time.perf_counter() - begin) * 1e3
        rank.barrier()
        before, start = usage(), time.perf_counter()
        if rank.rank == 1:
            time.sleep(wait)
        bf.neighbor_allreduce(small, name="late")
        share = (usage() - before) / (time.perf_counter() - start)
        if round_ >= 0:
            alone.append(quiet)
            # Those that were really beside it.
            beside.append(statistics.median(busy if under_way else busy[: len(busy) // 2]))
            whole.append(took)
            cpu.append(share * 100)
    bf.shutdown()
    return {"alone": alone, "beside": beside, "large": whole, "cpu": cpu}


def usage() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--mebibytes", type=int, default=64, help="size of the large tensor")
    arguments.add_argument("--wait", type=float, default=2.0, help="seconds")
    options = arguments.parse_args()
    bench.build()
    settings: dict[str, Any] = {"size": options.mebibytes << 20, "rounds": options.rounds}
    settings["wait"] = options.wait
    with bench.network(2, rate=RATE) as lab:
        ranks = bench.launch(body, 2, lab=lab, arguments=settings)
    report = bench.Report(f"4 KiB beside {options.mebibytes} MiB at 1 Gb/s")
    report.value("4 KiB alone, p50", ranks[0]["alone"], "ms")
    report.value("4 KiB beside the large one, p50", ranks[0]["beside"], "ms", at_most=10)
    report.value("the large one", ranks[0]["large"], "ms")
    report.value("share of a core while waiting", ranks[0]["cpu"], "%", at_most=2)
    report.print(options.json)


if __name__ == "__main__":
    main()
