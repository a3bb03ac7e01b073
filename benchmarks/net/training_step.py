"""A training step on slow links: a perceptron of 27 MiB on 4 hosts at 1 Gb/s, momentum SGD.

784 - 7 × 1024 - 10, cross-entropy, one thread a rank. Ours is DmSGD on the one-peer exponential
graph: in each step a rank sends its model to one other. Beside it the computation alone, PyTorch's
DistributedDataParallel over gloo without and with messages of 16 bits, Decent-DP on the same graph,
and the wire: the time in which a link carries the model once. The time is that of a step in a
sequence of steps: what one step leaves to be done by the next is under way at both ends of it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench
from bench import Series
from net.common import RATE, gloo, takes, wire_us

COMPUTE, DDP, DDP16, DECENT = "compute alone", "DDP", "DDP, fp16 hook", "Decent-DP"
OURS = "bluefog"
VARIANTS = {
    OURS: {},
    "bluefog, no overlap": {"overlap": False},
    "bluefog, delayed": {"overlap": "delayed"},
    "bluefog, bf16": {"message_dtype": "bfloat16"},
    "bluefog, delayed, bf16": {"overlap": "delayed", "message_dtype": "bfloat16"},
}
LR, BETA = 1e-3, 0.9
DECENT_PACKAGES = ["decent-dp==0.2.3", "loguru==0.7.3"]
DECENT_FOLDER = bench.ROOT / "build" / "decent-dp"


def install_decent_dp() -> None:
    """Into a folder that only this benchmark looks at; PyTorch is the installed one."""
    if not (DECENT_FOLDER / "decent_dp").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run([*pip, "--target", str(DECENT_FOLDER), *DECENT_PACKAGES], check=True)


class Trainer:
    """A model of its own and how it is stepped."""

    def __init__(self, torch: Any, data: Any) -> None:
        torch.manual_seed(1)
        widths = [784, *[1024] * 7, 10]
        layers: list[Any] = []
        for a, b in zip(widths, widths[1:]):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        self.model: Any = torch.nn.Sequential(*layers[:-1])
        self.loss = torch.nn.functional.cross_entropy
        self.data = data
        self.optimizer: Any = None

    def step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        inputs, labels = self.data
        self.loss(self.model(inputs), labels).backward()
        if self.optimizer is not None:
            self.optimizer.step()


def body(
    rank: bench.Rank, rounds: int, steps: int, batch: int, variants: list[str], others: list[str]
) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    rank.open(64, blocked=True)
    bf = rank.init()
    bf.set_topology(bf.topology.one_peer_exponential(rank.size))
    dist = gloo(rank)
    generator = torch.Generator().manual_seed(rank.rank)
    data = (
        torch.rand(batch, 784, generator=generator),
        torch.randint(10, (batch,), generator=generator),
    )
    absent = []

    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, LR, BETA)

    def alone(trainer: Trainer) -> None:
        trainer.optimizer = sgd(trainer.model.parameters())

    def ddp(trainer: Trainer, half: bool = False) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        trainer.model = torch.nn.parallel.DistributedDataParallel(trainer.model)
        if half:
            trainer.model.register_comm_hook(None, fp16_compress_hook)
        trainer.optimizer = sgd(trainer.model.parameters())

    def decent(trainer: Trainer) -> None:
        sys.path.append(str(DECENT_FOLDER))
        from decent_dp.ddp import DecentralizedDataParallel
        from loguru import logger

        logger.remove()
        # It steps by itself, during back-propagation.
        trainer.model = DecentralizedDataParallel(
            trainer.model,
            lambda named: sgd([p for _, p in named]),
            topology="one-peer-exp",
            _local_world_size=1,
        )

    def ours(trainer: Trainer, options: dict[str, Any]) -> None:
        named = trainer.model.named_parameters()
        trainer.optimizer = bf.optim.DmSGD(named, LR, BETA, **options)

    makers: dict[str, Callable[[Trainer], None]] = {
        COMPUTE: alone,
        DDP: ddp,
        DDP16: lambda t: ddp(t, half=True),
        DECENT: decent,
    }
    makers = {name: makers[name] for name in others}
    for name in variants:
        options = VARIANTS[name]
        needs = [("message_dtype", "")] if "message_dtype" in options else []
        needs += [("overlap", "delayed")] if options.get("overlap") == "delayed" else []
        if not all(takes(bf.optim.DmSGD, *need) for need in needs):
            absent.append(name)
            continue
        makers[name] = lambda t, o=options: ours(t, o)

    def series(name: str, trainer: Trainer) -> Series:
        def run() -> int:
            trainer.step()  # From here on the steps before are under way.
            rank.barrier()
            start = time.perf_counter_ns()
            for _ in range(steps):
                trainer.step()
            return (time.perf_counter_ns() - start) // steps

        def finite(_: Any) -> bool:
            return all(bool(p.isfinite().all()) for p in trainer.model.parameters())

        return Series(name, run, check=finite, native=True)

    contestants = []
    for name, make in makers.items():
        trainer = Trainer(torch, data)
        try:
            make(trainer)
        except (TypeError, ValueError) as e:
            if name not in variants:
                raise
            absent.append(f"{name} ({e})")  # The same on all ranks.
            continue
        contestants.append(series(name, trainer))
    result = bench.measure(rank, contestants, rounds, 1)
    dist.destroy_process_group()
    bf.shutdown()
    return {**result, "absent": absent}


def report_batch(options: Any, lab: bench.Lab, batch: int) -> bench.Report:
    report = bench.Report(f"training step, batch {batch}, {options.hosts} hosts at 1 Gb/s")
    variants = options.variants.split(",") if options.variants else list(VARIANTS)
    others = options.others.split(",") if options.others else [COMPUTE, DDP, DDP16, DECENT]
    settings = {"rounds": options.rounds, "steps": options.steps, "batch": batch}
    settings |= {"variants": variants, "others": others}
    results = bench.launch(body, options.hosts, lab=lab, arguments=settings)
    report.add(results)
    for name in results[0]["absent"]:
        print(f"not in this bluefog: {name}")
    parameters = 784 * 1024 + 6 * 1024 * 1024 + 1024 * 10 + 7 * 1024 + 10
    wire = wire_us(4 * parameters)
    hidden = batch >= 384  # The computation takes longer than the wire.
    report.limit(OURS, "wire", wire, at_most=None if hidden else 1.06)
    report.ratio(OURS, COMPUTE, at_most=1.08 if hidden else None)
    report.ratio(DDP, OURS, at_least=1.45 if hidden else 1.85)
    report.ratio(DECENT, OURS, at_least=1.12 if hidden else None)
    for name in VARIANTS:
        if name == OURS:
            continue
        bf16 = "bf16" in name and not hidden
        report.ratio(name, COMPUTE, at_most=1.2 if bf16 else None)
        report.ratio(DDP, name, at_least=2.7 if bf16 else None)
        report.ratio(DDP16, name, at_least=1.7 if bf16 else None)
        report.ratio(DECENT, name, at_least=1.45 if bf16 else None)
        report.ratio(name, OURS)
        if "bf16" in name:
            report.limit(name, "wire of 16 bits", wire / 2)
    report.limit(COMPUTE, "wire", wire)
    return report


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--hosts", type=int, default=4, help="a power of two (%(default)s)")
    arguments.add_argument("--batch", default="384,96", help="sizes, separated by commas")
    arguments.add_argument("--steps", type=int, default=4, help="in each measurement")
    arguments.add_argument("--variants", help=f"some of: {','.join(VARIANTS)}")
    arguments.add_argument("--others", help=f"some of: {COMPUTE},{DDP},{DDP16},{DECENT}")
    options = arguments.parse_args()
    bench.build()
    install_decent_dp()
    with bench.network(options.hosts, rate=RATE) as lab:
        for batch in map(int, options.batch.split(",")):
            report = report_batch(options, lab, batch)
            json_file = options.json
            if json_file and "," in options.batch:
                path = Path(json_file)
                json_file = str(path.with_name(f"{path.stem}-{batch}{path.suffix}"))
            report.print(json_file)


if __name__ == "__main__":
    main()
