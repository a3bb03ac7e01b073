"""2 hosts of 4 ranks that share a link of 1 Gb/s: hierarchical average against the naive one.

Naive: every rank exchanges its tensor with its counterpart on the other host, so that each link
carries it 4 times. Hierarchical: the ranks of a host reduce-scatter, exchange shards with the other
host and gather, so that it is carried once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
from bench import Series
from net.common import RATE, wire_us

NAIVE, OURS = "with the counterpart", "hierarchical"


def body(rank: bench.Rank, size: int, rounds: int, iterations: int) -> dict[str, Any]:
    import numpy as np
    import torch

    rank.open(64, blocked=True)
    bf = rank.init()
    n, local = rank.size, int(bf.local_size())
    counterpart = (rank.rank + n // 2) % n
    bf.set_topology(
        bf.topology.from_matrix((np.eye(n) + np.roll(np.eye(n), n // 2, 1)) / 2, "counterparts")
    )
    count = size // 4
    pattern = torch.arange(count) % 16
    x = (pattern + rank.rank).float()

    def right(mean: float):
        def check(result: torch.Tensor) -> bool:
            fine = torch.equal(result, (pattern + mean).float())
            result.fill_(float("nan"))
            return fine

        return check

    naive = right((rank.rank + counterpart) / 2)
    series = [Series(NAIVE, lambda: bf.neighbor_allreduce(x, name="naive"), check=naive)]
    if hasattr(bf, "hierarchical_neighbor_allreduce"):
        bf.set_machine_topology(bf.topology.fully_connected(n // local))
        series.append(
            Series(
                OURS,
                lambda: bf.hierarchical_neighbor_allreduce(x, name="hierarchical"),
                check=right((n - 1) / 2),
            )
        )
    result = bench.measure(rank, series, rounds, iterations)
    bf.shutdown()
    return result


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--ranks", type=int, default=4, help="of each host (%(default)s)")
    arguments.add_argument("--mebibytes", type=int, default=16, help="size of the tensor")
    arguments.add_argument("--iterations", type=int, default=2, help="in each round")
    options = arguments.parse_args()
    bench.build()
    size = options.mebibytes << 20
    report = bench.Report(
        f"{options.mebibytes} MiB over 2 hosts of {options.ranks} ranks at 1 Gb/s"
    )
    with bench.network(2, options.ranks, RATE) as lab:
        settings = {"size": size, "rounds": options.rounds, "iterations": options.iterations}
        report.add(bench.launch(body, lab.size, lab=lab, arguments=settings))
    report.limit(NAIVE, f"{options.ranks} × wire", options.ranks * wire_us(size))
    report.limit(OURS, "wire", wire_us(size))
    report.ratio(OURS, NAIVE, at_most=1 / 3)
    report.print(options.json)


if __name__ == "__main__":
    main()
