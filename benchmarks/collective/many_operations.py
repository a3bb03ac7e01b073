"""Small operations by the thousand under way at once: what each costs, by their number.

``neighbor_allreduce_nonblocking`` of 4 elements under a name of its own each, all submitted before
the first is waited for; every second rank submits in the opposite order. Values are checked.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench

NUMBERS = (10, 1000, 20_000)


def body(rank: bench.Rank, rounds: int) -> dict[str, list[float]]:
    import torch

    rank.open(64)
    bf = rank.init()
    bf.set_topology(bf.topology.fully_connected(rank.size))
    tensors = [torch.full((4,), float(rank.rank + i)) for i in range(max(NUMBERS))]
    mean = (rank.size - 1) / 2
    times: dict[str, list[float]] = {str(n): [] for n in NUMBERS}
    # The fewest first: after twenty thousand, malloc is busy with the benchmark's own debris.
    for n in NUMBERS:
        for _ in range(rounds):
            order = range(n) if rank.rank % 2 == 0 else range(n - 1, -1, -1)
            bf.barrier()
            begin = time.perf_counter()
            handles = {
                i: bf.neighbor_allreduce_nonblocking(tensors[i], name=f"t{i}") for i in order
            }
            means = {i: bf.synchronize(handle) for i, handle in handles.items()}
            times[str(n)].append((time.perf_counter() - begin) / n * 1e6)
            if not all(abs(y[0].item() - i - mean) < 1e-2 for i, y in means.items()):
                raise AssertionError(f"wrong values on rank {rank.rank}")
            del handles, means
            time.sleep(0.05)  # Releases that nobody waits for are still to come.
    bf.shutdown()
    return times


def main() -> None:
    options = bench.parser(__doc__).parse_args()
    bench.build()
    report = bench.Report("Operations of 16 bytes under way at once: time of each")
    for size in (2, 3):
        ranks = bench.launch(body, size, arguments={"rounds": options.rounds})
        for n in NUMBERS:
            slowest = [max(turn) for turn in zip(*(r[str(n)] for r in ranks))]
            report.value(f"{n} at once, {size} ranks", slowest, "us")
    report.print(options.json)


if __name__ == "__main__":
    main()
