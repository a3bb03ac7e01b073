"""One step of DecentLaM over one large parameter, 2 ranks, gradient given: exchange and update.

y = x - lr g; v = beta v + (x - W y); x = x - v. Ours in one call (through Python and C++), beside
PyTorch code around neighbor_allreduce, as one writes it and with everything preallocated, and
beside the same kernels without an engine (bare). Every iteration starts from the same state, and x
and v are compared with a float64 reference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
from bench import Series

PYTHON, CPP = "DecentLaM.step(), Python", "DecentLaM, C++"
NATURAL, PREALLOCATED, BARE = "torch, natural", "torch, preallocated", "bare produce, mix, update"
BARE_WHOLE = "bare, payload not in a ring"
LR, BETA = 0.05, 0.9


def body(rank: bench.Rank, size: int, rounds: int, iterations: int) -> dict[str, Any]:
    import torch

    torch.set_grad_enabled(False)
    count = size // 4
    rank.open(size)
    rank.join()
    bf = rank.init()
    rank.call("bench_optimizer", 1, [count])

    generator = torch.Generator().manual_seed(1)
    x0, v0 = (torch.rand(count, generator=generator) for _ in range(2))
    gradients = [torch.rand(count, generator=generator) for _ in range(rank.size)]
    g = gradients[rank.rank]
    mixed = x0.double() - LR * (gradients[0].double() + gradients[1].double()) / 2
    expected_v = (BETA * v0.double() + x0.double() - mixed).float()
    expected_x = (x0.double() - expected_v.double()).float()
    del mixed

    x = torch.nn.Parameter(x0.clone())
    x.grad = g
    optimizer = bf.optim.DecentLaM([x], lr=LR, momentum=BETA, overlap=False)
    v = optimizer.state[x]["velocity"]
    y = bf.empty(count)
    expected = [(x, expected_x), (v, expected_v)]

    def reset() -> None:
        x.copy_(x0)
        v.copy_(v0)

    def right(_: Any) -> bool:
        differences = [torch.sub(a, b, out=y).abs_().max() for a, b in expected]
        return all(bool(d < 1e-6) for d in differences)

    def natural() -> None:
        mix = bf.neighbor_allreduce(x - LR * g)
        v.mul_(BETA).add_(x - mix)
        x.sub_(v)

    def preallocated() -> None:
        torch.add(x, g, alpha=-LR, out=y)
        mix = bf.neighbor_allreduce(y)
        torch.sub(x, mix, out=y)
        torch.add(y, v, alpha=BETA, out=v)
        x.sub_(v)

    def native() -> int:
        return rank.call("bench_step", [x], [g], [v], LR, BETA, 1)

    def bare(ring: int) -> int:
        return rank.call("bench_bare_step", x, g, v, count, LR, BETA, ring)

    series = [
        Series(BARE, lambda: bare(1), reset, right, native=True),
        Series(BARE_WHOLE, lambda: bare(0), reset, right, native=True),
        Series(CPP, native, reset, right, native=True),
        Series(PYTHON, optimizer.step, reset, right),
        Series(NATURAL, natural, reset, right),
        Series(PREALLOCATED, preallocated, reset, right),
    ]
    result = bench.measure(rank, series, rounds, iterations)
    bf.shutdown()
    rank.native.bench_leave()
    return result


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--mebibytes", type=int, default=64, help="size of the parameter")
    arguments.add_argument("--iterations", type=int, default=3, help="in each round")
    options = arguments.parse_args()
    bench.build()
    report = bench.Report(f"DecentLaM step, {options.mebibytes} MiB, 2 ranks, private tensors")
    settings = {
        "size": options.mebibytes << 20,
        "rounds": options.rounds,
        "iterations": options.iterations,
    }
    report.add(bench.launch(body, 2, arguments=settings))
    report.ratio(PYTHON, NATURAL, at_most=0.5)
    report.ratio(PYTHON, PREALLOCATED, at_most=0.75)
    report.ratio(PYTHON, BARE, at_most=1.25)
    report.ratio(CPP, BARE, at_most=1.25)
    report.ratio(CPP, BARE_WHOLE)
    report.print(options.json)


if __name__ == "__main__":
    main()
