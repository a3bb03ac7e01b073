"""One rank takes twice as long to compute: what the others lose, one-peer graph and all-reduce.

4 hosts at 1 Gb/s, 4 MiB. A step is computing, then an average. Computing is sleeping here, so that
ranks do not slow each other down, and the slow rank is either the same all the time or another one
in each step. In a graph of neighbours a late rank holds up those who wait for it at once, and the
rest only some steps later; an all-reduce holds up everybody in the same step. A rank that is late
in every step sets the pace in the end, whatever the graph.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
from net.common import RATE

ONE_PEER, ALL = "one-peer exponential", "all-reduce"
EVEN, SAME, CHANGING = "none", "always the same", "another one in each step"


def body(
    rank: bench.Rank, size: int, rounds: int, steps: int, compute: float, factor: float
) -> dict[str, list[float]]:
    import torch

    rank.open(64, blocked=True)
    bf = rank.init()
    bf.set_topology(bf.topology.one_peer_exponential(rank.size))
    x = torch.full((size // 4,), float(rank.rank))
    operations = {
        ONE_PEER: lambda: bf.neighbor_allreduce(x, name="neighbours"),
        ALL: lambda: bf.allreduce(x, name="all"),
    }
    plan = random.Random(1)  # The same on all ranks.
    times: dict[str, list[float]] = {}
    cases = [(o, s) for o in operations for s in (EVEN, SAME, CHANGING)]
    for round_ in range(-1, rounds):
        for operation, straggler in cases[round_ % 6 :] + cases[: round_ % 6]:
            # Rank 0 is always slow, or never: what the others lose is measured on the others.
            slow = {EVEN: lambda: -1, SAME: lambda: 0, CHANGING: lambda: plan.randrange(rank.size)}
            operations[operation]()
            rank.barrier()
            begin = time.perf_counter()
            for _ in range(steps):
                mine = slow[straggler]() == rank.rank
                time.sleep(compute * (factor if mine else 1))
                operations[operation]()
            seconds = (time.perf_counter() - begin) / steps
            if round_ >= 0:
                times.setdefault(f"{operation}: {straggler}", []).append(seconds)
    bf.shutdown()
    return times


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--hosts", type=int, default=4, help="(%(default)s)")
    arguments.add_argument("--mebibytes", type=int, default=4, help="size of the tensor")
    arguments.add_argument("--compute", type=float, default=0.05, help="seconds in a step")
    arguments.add_argument("--factor", type=float, default=2.0, help="of the slow rank")
    arguments.add_argument("--steps", type=int, default=10, help="in each measurement")
    options = arguments.parse_args()
    bench.build()
    settings = {"size": options.mebibytes << 20, "rounds": options.rounds, "steps": options.steps}
    settings |= {"compute": options.compute, "factor": options.factor}
    with bench.network(options.hosts, rate=RATE) as lab:
        ranks = bench.launch(body, options.hosts, lab=lab, arguments=settings)
    report = bench.Report(
        f"a rank that computes {options.factor:g} times as long, {options.hosts} hosts, "
        f"{options.mebibytes} MiB, {options.compute * 1e3:g} ms"
    )
    # The mean of those that are never slow by themselves; of all where it goes round.
    step = {
        name: [sum(ts) / len(ts) for ts in zip(*[r[name] for r in ranks[1:]])] for name in ranks[0]
    }
    for name, seconds in step.items():
        report.value(f"step, {name}", [s * 1e3 for s in seconds], "ms")
    for straggler in (SAME, CHANGING):
        slowdown = {}
        for operation in (ONE_PEER, ALL):
            pairs = zip(step[f"{operation}: {straggler}"], step[f"{operation}: {EVEN}"])
            slowdown[operation] = [a / b for a, b in pairs]
            report.value(f"slowdown, {operation}: {straggler}", slowdown[operation], "×")
        pairs = zip(step[f"{ALL}: {straggler}"], step[f"{ONE_PEER}: {straggler}"])
        report.value(
            f"{ALL} ÷ {ONE_PEER}: {straggler}", [a / b for a, b in pairs], "", at_least=1.0
        )
    report.print(options.json)


if __name__ == "__main__":
    main()
