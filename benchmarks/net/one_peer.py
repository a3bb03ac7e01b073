"""One-peer exponential averaging of one tensor, 8 hosts of one rank, beside the wire and gloo.

Every round each rank sends its tensor to one other and receives one. Beside it the same exchange
through plain sockets, gloo's ring all-reduce over the same links, and messages in bfloat16. The
wire time is that of the payload alone (``common.wire_us``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
from bench import Series
from net.common import RATE, Wire, addresses, bytes_of, gloo, takes, wire_us

OURS, BF16 = "bluefog, fp32 messages", "bluefog, bf16 messages"
SOCKETS, RING = "plain sockets", "gloo all_reduce"


def body(
    rank: bench.Rank, size: int, rounds: int, iterations: int, hosts: list[str]
) -> dict[str, Any]:
    import torch

    rank.open(64, blocked=True)
    bf = rank.init()
    dist = gloo(rank)
    bf.set_topology(bf.topology.one_peer_exponential(rank.size))
    offsets = [1 << k for k in range((rank.size - 1).bit_length())]
    wire = Wire(rank, hosts, offsets)

    # Halves and small integers: bfloat16 is exact, and every result is known.
    count = size // 4
    pattern = torch.arange(count) % 16
    x = (pattern + rank.rank).float()
    work = torch.empty(count)
    calls = dict.fromkeys((OURS, BF16, SOCKETS), 0)

    def source(name: str) -> int:
        """Whom the last call of a series heard."""
        return (rank.rank - offsets[(calls[name] - 1) % len(offsets)]) % rank.size

    def ours(name: str, **how: Any) -> torch.Tensor:
        calls[name] += 1
        return bf.neighbor_allreduce(x, name=name, **how)

    def mixed(name: str):
        def check(result: torch.Tensor) -> bool:
            right = torch.equal(result, pattern + (rank.rank + source(name)) / 2)
            result.fill_(float("nan"))  # The pool hands it out again.
            return right

        return check

    def sockets() -> None:
        calls[SOCKETS] += 1
        wire.exchange((calls[SOCKETS] - 1) % len(offsets), bytes_of(x), bytes_of(work))

    total = pattern * rank.size + sum(range(rank.size))
    series = [
        Series(OURS, lambda: ours(OURS), check=mixed(OURS)),
        Series(
            SOCKETS,
            sockets,
            lambda: work.fill_(float("nan")),
            lambda _: torch.equal(work, pattern + source(SOCKETS)),
        ),
        Series(
            RING,
            lambda: dist.all_reduce(work),
            lambda: work.copy_(x),
            lambda _: torch.equal(work, total.float()),
        ),
    ]
    if takes(bf.neighbor_allreduce, "message_dtype"):
        half = {"message_dtype": "bfloat16"}
        series.append(Series(BF16, lambda: ours(BF16, **half), check=mixed(BF16)))
    result = bench.measure(rank, series, rounds, iterations)
    dist.destroy_process_group()
    bf.shutdown()
    return result


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--hosts", type=int, default=8, help="a power of two (%(default)s)")
    arguments.add_argument("--mebibytes", type=int, default=16, help="size of the tensor")
    arguments.add_argument("--iterations", type=int, default=3, help="in each round")
    options = arguments.parse_args()
    bench.build()
    size = options.mebibytes << 20
    report = bench.Report(
        f"one-peer exponential, {options.mebibytes} MiB, {options.hosts} hosts at 1 Gb/s"
    )
    with bench.network(options.hosts, rate=RATE) as lab:
        settings = {"size": size, "rounds": options.rounds, "iterations": options.iterations}
        settings["hosts"] = addresses(lab)
        report.add(bench.launch(body, options.hosts, lab=lab, arguments=settings))
    wire = wire_us(size)
    report.limit(OURS, "wire", wire, at_most=1.10)
    report.limit(SOCKETS, "wire", wire)
    report.limit(BF16, "wire of 16 bits", wire / 2)
    report.ratio(OURS, SOCKETS)
    report.ratio(RING, OURS, at_least=1.7)
    report.ratio(OURS, BF16, at_least=1.7)
    report.print(options.json)


if __name__ == "__main__":
    main()
