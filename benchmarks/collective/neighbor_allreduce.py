"""neighbor_allreduce of one large tensor beside its limit, gloo and MPI, on 2 ranks.

Ours through C++ (output given) and through Python (a fresh output from the pool), with the input in
the arena, where the neighbour reads it in place, and in private memory. Bare is the same work
without an engine. gloo and MPI get private tensors; gloo's all_reduce works in place, and restoring
its input is not timed; both all-reduces only sum.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
from bench import Series

GLOO, GLOO_P2P = "gloo all_reduce", "gloo isend, irecv and mean"
MPI, MPI_ALL = "MPI_Neighbor_allgather and mean", "MPI_Allreduce"


def ours(kind: str, place: str) -> str:
    return f"bluefog {kind}, {place}"


def body(rank: bench.Rank, size: int, rounds: int, iterations: int, mpi: bool) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    if mpi:
        rank.mpi_init()
    count, peer = size // 4, 1 - rank.rank
    rank.open(size)
    rank.join()
    bf = rank.init()
    dist.init_process_group(
        "gloo", init_method=f"file://{rank.folder}/gloo", rank=rank.rank, world_size=rank.size
    )

    generator = torch.Generator().manual_seed(1)
    inputs = [torch.rand(count, generator=generator) for _ in range(rank.size)]
    x, total = inputs[rank.rank], inputs[0] + inputs[1]
    mean = total / 2  # Two addends: equal to the bit in whatever order.
    out, work = torch.empty(count), torch.empty(count)
    bare = rank.tensor(rank.native.bench_tensor(), count).copy_(x)
    arena = rank.tensor(rank.native.bench_allocate(bench._native(size)), count).copy_(x)
    arena_py = bf.empty(count).copy_(x)

    def poison() -> None:
        out.fill_(float("nan"))
        work.fill_(float("nan"))

    def same(expected: torch.Tensor, got: torch.Tensor = out):
        return lambda _: torch.equal(got, expected)

    def fresh(result: torch.Tensor) -> bool:
        right = torch.equal(result, mean)
        result.fill_(float("nan"))  # The pool hands it out again.
        return right

    def native(name: str, function: str, *args: Any) -> Series:
        return Series(name, lambda: rank.call(function, *args), poison, same(mean), native=True)

    def exchange() -> None:
        requests = [dist.isend(x, peer), dist.irecv(work, peer)]
        for request in requests:
            request.wait()
        torch.lerp(x, work, 0.5, out=out)

    series = [
        native("bare, arena", "bench_bare", 1, bare, out, count),
        native("bare, private", "bench_bare", 0, x, out, count),
        native(ours("C++", "arena"), "bench_average", arena, out, count),
        native(ours("C++", "private"), "bench_average", x, out, count),
        Series(ours("Python", "arena"), lambda: bf.neighbor_allreduce(arena_py), check=fresh),
        Series(ours("Python", "private"), lambda: bf.neighbor_allreduce(x), check=fresh),
        Series(GLOO, lambda: dist.all_reduce(work), lambda: work.copy_(x), same(total, work)),
        Series(GLOO_P2P, exchange, poison, lambda _: torch.allclose(out, mean)),
    ]
    if mpi:
        series += [
            Series(
                MPI,
                lambda: rank.mpi("bench_mpi_neighbor_mean", x, work, out, count),
                poison,
                same(mean),
                native=True,
            ),
            Series(
                MPI_ALL,
                lambda: rank.mpi("bench_mpi_allreduce", x, out, count),
                poison,
                same(total),
                native=True,
            ),
        ]
    result = bench.measure(rank, series, rounds, iterations)
    dist.destroy_process_group()
    bf.shutdown()
    rank.native.bench_leave()
    if mpi:
        rank.mpi("bench_mpi_finalize")
    return result


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--mebibytes", type=int, default=64, help="size of the tensor")
    arguments.add_argument("--iterations", type=int, default=3, help="in each round")
    options = arguments.parse_args()
    bench.build()
    report = bench.Report(f"neighbor_allreduce, {options.mebibytes} MiB, 2 ranks")
    mpi = bench.has_mpi()
    ranks = bench.launch(
        body,
        2,
        mpi=mpi,
        arguments={
            "size": options.mebibytes << 20,
            "rounds": options.rounds,
            "iterations": options.iterations,
            "mpi": mpi,
        },
    )
    report.add(ranks)
    for kind in ("C++", "Python"):
        for place, gloo, mpi_target in (("arena", 5, 3), ("private", 2.5, 1.5)):
            report.ratio(ours(kind, place), f"bare, {place}", at_most=1.25)
            report.ratio(GLOO, ours(kind, place), at_least=gloo)
            report.ratio(GLOO_P2P, ours(kind, place))
            report.ratio(MPI, ours(kind, place), at_least=mpi_target)
            report.ratio(MPI_ALL, ours(kind, place))
    for place in ("arena", "private"):  # What no engine can exceed on this machine.
        report.ratio(GLOO, f"bare, {place}")
        report.ratio(MPI, f"bare, {place}")
    report.print(options.json)


if __name__ == "__main__":
    main()
