"""More ranks than cores: what is left for computing while a transfer is pending, 8 ranks.

The graph is complete and rank 0 submits last, so that the operation of every other rank is pending.
*pending*: all ranks compute, 1 … 7 after having submitted. *waiting*: half of the ranks compute,
the others wait inside the operation; it is compared with those others sleeping. Throughput is what
all computing ranks get done together in a fixed time. Values are checked each time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench

PHASES = ("alone", "pending", "half sleeping", "half waiting")


def body(rank: bench.Rank, size: int, rounds: int, seconds: float) -> dict[str, list[int]]:
    import torch

    rank.open(64)
    bf = rank.init()
    bf.set_topology(bf.topology.fully_connected(rank.size))
    x = torch.full((size // 4,), float(rank.rank))
    mean = (rank.size - 1) / 2
    a, b, c = (torch.rand(128, 128) for _ in range(3))  # Stays in the cache of a core.

    def compute() -> int:
        end, units = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            for _ in range(10):
                torch.mm(a, b, out=c)
            units += 1
        return units

    def submit() -> int:
        return bf.neighbor_allreduce_nonblocking(x)

    def finish(handle: int) -> None:
        y = bf.synchronize(handle)
        if not torch.allclose(y, torch.full_like(y, mean)):
            raise AssertionError(f"wrong values on rank {rank.rank}")

    idle = rank.rank >= rank.size // 2
    units: dict[str, list[int]] = {p: [] for p in PHASES}
    for round_ in range(-1, rounds):
        for phase in PHASES[round_ % 4 :] + PHASES[: round_ % 4]:
            before = phase in ("pending", "half waiting") and rank.rank != 0
            bf.barrier()
            handle = submit() if before else None
            bf.barrier()
            done = 0
            if phase == "half sleeping" and idle:
                time.sleep(seconds)
            elif phase != "half waiting" or not idle:
                done = compute()
            finish(submit() if handle is None else handle)
            if round_ >= 0:
                units[phase].append(done)
    bf.shutdown()
    return units


def main() -> None:
    arguments = bench.parser(__doc__, rounds=21)
    arguments.add_argument("-np", type=int, default=8, dest="ranks", help="ranks (%(default)s)")
    arguments.add_argument("--mebibytes", type=int, default=1, help="size of the tensor")
    arguments.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    options = arguments.parse_args()
    bench.build()
    settings = {
        "size": options.mebibytes << 20,
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    ranks = bench.launch(body, options.ranks, arguments=settings)
    total = {p: [sum(units) for units in zip(*[r[p] for r in ranks])] for p in PHASES}
    report = bench.Report(f"Throughput of compute, {options.ranks} ranks on {bench.CORES} cores")
    for phase, base in (("pending", "alone"), ("half waiting", "half sleeping")):
        shares = [a / b for a, b in zip(total[phase], total[base])]
        report.value(f"{phase} ÷ {base}", shares, "", at_least=0.95)
    report.print(options.json)


if __name__ == "__main__":
    main()
