"""neighbor_allreduce of 4 KiB: submit to done, through C++ and through Python, on a ring.

C++ writes into a given output; Python returns a new array. Bare is the same exchange without an
engine. Values are checked at both ends of every round.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
from bench import Series

COUNT = 1024
BARE, CPP, TORCH, NUMPY = "bare", "C++", "Python, torch", "Python, numpy"


def body(rank: bench.Rank, rounds: int, iterations: int) -> dict[str, Any]:
    import numpy as np
    import torch

    import bluefog

    rank.open(COUNT * 4)
    rank.join()
    bf = rank.init()
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.rand(COUNT, generator=generator) for _ in range(rank.size)]
    members = {rank.rank, (rank.rank + 1) % rank.size, (rank.rank - 1) % rank.size}
    mean = sum(inputs[r] for r in members) / len(members)
    x, out = inputs[rank.rank], torch.empty(COUNT)
    array = x.numpy()

    def poison() -> None:
        out.fill_(float("nan"))

    def right(_: Any) -> bool:
        return torch.allclose(out, mean, atol=0, rtol=1e-6)

    def fresh(result: Any) -> bool:
        right = np.allclose(np.asarray(result), mean.numpy(), atol=0, rtol=1e-6)
        result[:] = float("nan")  # The pool hands it out again.
        return right

    series = [
        Series(BARE, lambda: rank.call("bench_bare", 0, x, out, COUNT), poison, right, True),
        Series(CPP, lambda: rank.call("bench_average", x, out, COUNT), poison, right, True),
        Series(TORCH, lambda: bf.neighbor_allreduce(x), check=fresh),
        Series(NUMPY, lambda: bluefog.neighbor_allreduce(array), check=fresh),
    ]
    result = bench.measure(rank, series, rounds, iterations, check_each=False)
    bf.shutdown()
    rank.native.bench_leave()
    return result


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("-np", type=int, default=2, dest="ranks", help="ranks (%(default)s)")
    arguments.add_argument("--iterations", type=int, default=200, help="in each round")
    arguments.add_argument("--blocked", action="store_true", help="every wait of the engine blocks")
    options = arguments.parse_args()
    bench.build()
    settings = {"rounds": options.rounds, "iterations": options.iterations}
    env = {"BLUEFOG_DRIVE_US": "0"} if options.blocked else None
    blocked = ", every wait blocks" if options.blocked else ""
    report = bench.Report(f"neighbor_allreduce, 4 KiB, {options.ranks} ranks, ring{blocked}")
    report.add(bench.launch(body, options.ranks, env=env, arguments=settings))
    limits = {2: 60 if options.blocked else 8, 8: 40}
    report.time(CPP, at_most=limits.get(options.ranks))
    report.difference(TORCH, CPP, at_most=15)
    report.difference(NUMPY, CPP, at_most=15)
    report.ratio(CPP, BARE)
    report.print(options.json)


if __name__ == "__main__":
    main()
