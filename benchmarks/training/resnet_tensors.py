"""121 tensors of a ResNet-50, averaged together, beside one tensor of the same size; 2 ranks.

All averages are in flight at the same time. The shapes are those of ResNet-50 without the last two
convolutions and their normalizations: 22 million elements, 84.5 MiB. Weight and bias of a
normalization count as one tensor, but for the first in each block and the stem's.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
from bench import Series

# Channels inside a block and behind it, number of blocks.
STAGES = [(64, 256, 3), (128, 512, 4), (256, 1024, 6), (512, 2048, 3)]


def shapes() -> list[tuple[int, ...]]:
    made: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for inner, outer, blocks in STAGES:
        for block in range(blocks):
            made += [(inner, channels, 1, 1), (inner,), (inner,)]
            if (inner, block) != (512, 2):
                made += [(inner, inner, 3, 3), (2, inner), (outer, inner, 1, 1), (2, outer)]
            if block == 0:
                made += [(outer, channels, 1, 1), (2, outer)]
            channels = outer
    return [*made, (1000, 2048), (1000,)]


def body(rank: bench.Rank, rounds: int, iterations: int) -> dict[str, Any]:
    import torch

    sizes = shapes()
    counts = [math.prod(s) for s in sizes]
    count = sum(counts)
    assert len(sizes) == 121 and 84 <= count * 4 / 2**20 < 85
    rank.open(count * 4)
    rank.join(len(sizes))
    bf = rank.init()

    generator = torch.Generator().manual_seed(1)
    inputs = [torch.rand(count, generator=generator) for _ in range(rank.size)]
    mean = (inputs[0] + inputs[1]) / 2
    expected = mean.split(counts)
    out = torch.empty(count)
    series = []

    def fresh(results: Any) -> bool:
        results = results if isinstance(results, list) else [results]
        wanted = expected if len(results) > 1 else [mean]
        right = all(torch.equal(r.view(-1), e) for r, e in zip(results, wanted))
        for r in results:
            r.fill_(float("nan"))
        return right

    for place in ("arena", "private"):
        if place == "private":
            whole, whole_cpp = (inputs[rank.rank] for _ in range(2))
            many = [t.clone().view(s) for t, s in zip(whole.split(counts), sizes)]
            many_cpp = many
        else:
            allocate = rank.native.bench_allocate
            whole = bf.empty(count).copy_(inputs[rank.rank])
            many = [bf.empty(s) for s in sizes]
            whole_cpp, *many_cpp = (
                rank.tensor(allocate(bench._native(4 * n)), n) for n in (count, *counts)
            )
            whole_cpp.copy_(whole)
            for tensors in (many, many_cpp):
                for t, source in zip(tensors, whole.split(counts)):
                    t.view(-1).copy_(source)
        outs = list(out.split(counts))

        def all_python(tensors: list[torch.Tensor] = many) -> list[torch.Tensor]:
            handles = [bf.neighbor_allreduce_nonblocking(t) for t in tensors]
            return [bf.synchronize(h) for h in handles]

        def all_cpp(tensors: list[torch.Tensor] = many_cpp, outs: Any = outs) -> int:
            return rank.call("bench_average_many", len(tensors), tensors, outs, counts)

        def one_cpp(tensor: torch.Tensor = whole_cpp) -> int:
            return rank.call("bench_average", tensor, out, count)

        def poison() -> None:
            out.fill_(float("nan"))

        def right(_: Any) -> bool:
            return torch.equal(out, mean)

        series += [
            Series(f"121, C++, {place}", all_cpp, poison, right, native=True),
            Series(f"one, C++, {place}", one_cpp, poison, right, native=True),
            Series(f"121, Python, {place}", all_python, check=fresh),
            Series(
                f"one, Python, {place}",
                lambda whole=whole: bf.neighbor_allreduce(whole),
                check=fresh,
            ),
        ]
    result = bench.measure(rank, series, rounds, iterations)
    bf.shutdown()
    rank.native.bench_leave()
    return result


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--iterations", type=int, default=3, help="in each round")
    options = arguments.parse_args()
    bench.build()
    settings = {"rounds": options.rounds, "iterations": options.iterations}
    report = bench.Report("121 tensors of ResNet-50 ÷ one of 84.5 MiB, neighbor_allreduce, 2 ranks")
    report.add(bench.launch(body, 2, arguments=settings))
    for kind in ("C++", "Python"):
        for place in ("arena", "private"):
            report.ratio(f"121, {kind}, {place}", f"one, {kind}, {place}", at_most=1.5)
    report.print(options.json)


if __name__ == "__main__":
    main()
