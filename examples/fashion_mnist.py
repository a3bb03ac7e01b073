"""Train a perceptron (784-128-10) on Fashion-MNIST, every rank on its own share of the images.

    bluefog run -np 8 python examples/fashion_mnist.py --optimizer decentlam --topology ring \
        --partition by-label --batch-size 512 --lr 0.2 --epochs 10 --seeds 3 --json out.json

`--partition by-label` sorts the images by label, cuts them into two shards a rank and deals the
shards out at random: a rank sees two or three kinds of clothing, and only the averaging tells it of
the others. Several optimizers separated by commas are trained one after the other.
"""

import argparse
import gzip
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bluefog.torch as bf

DATA = Path("/usr/share/datasets/fashion-mnist")
OPTIMIZERS = {
    "dsgd": bf.optim.DSGD,
    "pmsgd": bf.optim.PmSGD,
    "dmsgd": bf.optim.DmSGD,
    "decentlam": bf.optim.DecentLaM,
}


def give_up(text: str) -> None:
    """End this rank, and say why: what is wrong on one rank only is told by nobody else."""
    sys.exit(f"fashion_mnist: rank {bf.rank()}: {text.removeprefix(f'rank {bf.rank()}: ')}")


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes from a gzipped idx file."""
    if not path.exists():
        give_up(f"{path} is missing: apt-get install dataset-fashion-mnist, or --data DIR")
    data = gzip.decompress(path.read_bytes())
    ndim = data[3]
    shape = np.frombuffer(data, ">i4", ndim, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def load(data: Path) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Training and test set: images as float32 [n, 784], labels as int64 [n].

    The mean training image is taken off, and what is left is at most about 2 in size.
    """
    sets = []
    for split in ("train", "t10k"):
        images = read_idx(data / f"{split}-images-idx3-ubyte.gz")
        labels = read_idx(data / f"{split}-labels-idx1-ubyte.gz")
        pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255.0)
        sets.append((pixels, torch.from_numpy(labels.astype(np.int64))))
    mean = sets[0][0].mean(dim=0)
    return tuple(((pixels - mean) / 0.5, labels) for pixels, labels in sets)


def my_share(labels: torch.Tensor, partition: str, seed: int) -> torch.Tensor:
    """Indices of the images of this rank; all ranks draw the same partition from the seed."""
    n = bf.size()
    generator = torch.Generator().manual_seed(seed)
    if partition == "iid":
        return torch.randperm(len(labels), generator=generator).chunk(n)[bf.rank()]
    shards = torch.argsort(labels, stable=True).chunk(2 * n)
    mine = torch.randperm(2 * n, generator=generator)[2 * bf.rank() : 2 * bf.rank() + 2]
    return torch.cat([shards[int(i)] for i in mine])


def make_model(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).float().mean())


def evaluate(model: torch.nn.Module, test: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Test accuracy of the averaged model and of the ranks, and how far the ranks are apart."""
    own = bf.allgather(torch.tensor([accuracy(model, *test)], dtype=torch.float64))
    consensus = bf.consensus_distance(model.parameters())
    with bf.consensus(model):
        mean = accuracy(model, *test)
    return {
        "acc_mean_model": mean,
        "acc_rank_mean": float(own.mean()),
        "acc_rank_min": float(own.min()),
        "consensus": float(consensus),
    }


def clocks() -> torch.Tensor:
    """Now, and the engine's busy and blocked time so far; nanoseconds, float64 [3]."""
    stats = bf.stats()
    times = [time.perf_counter_ns(), stats["busy_ns"], stats["blocked_ns"]]
    return torch.tensor(times, dtype=torch.float64)


def train(name, args, seed, train_set, test_set, progress) -> dict:
    """One run; collective."""
    x, y = train_set
    share = my_share(y, args.partition, seed)
    x, y = x[share], y[share]
    model = make_model(seed)
    overlap = "delayed" if args.delayed else not args.no_overlap
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "overlap": overlap}
    if args.message_dtype and name != "pmsgd":  # That averages gradients, over all ranks.
        options["message_dtype"] = args.message_dtype
    if name != "dsgd":
        options["momentum"] = args.momentum
    try:
        optimizer = OPTIMIZERS[name](model.named_parameters(), **options)
    except ValueError as error:  # A graph that the method does not stand, for example.
        give_up(str(error))

    # The same number of steps on all ranks: each counts on its neighbours in every step.
    steps = math.ceil(len(train_set[1]) / bf.size() / args.batch_size)
    total, warm_up = args.epochs * steps, max(1, args.epochs * steps // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loss_of = torch.nn.CrossEntropyLoss()
    order_of = torch.Generator().manual_seed(1000 * seed + bf.rank())
    # Of the steps alone, without the evaluations: nanoseconds in all, with an exchange under way,
    # and waiting for one.
    spent, curve = torch.zeros(3, dtype=torch.float64), []
    for _ in range(args.epochs):
        order = torch.randperm(len(y), generator=order_of)
        begin = clocks()
        for step in range(steps):
            batch = order[step * args.batch_size % len(y) :][: args.batch_size]
            optimizer.zero_grad()
            loss_of(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
        spent += clocks() - begin
        curve.append(evaluate(model, test_set))
        progress.set_postfix_str(f"{name} seed {seed}: {curve[-1]['acc_mean_model']:.3f}")
        progress.update()
    elapsed, busy, blocked = bf.allreduce(spent).tolist()
    return {
        "optimizer": name,
        "topology": args.topology,
        "partition": args.partition,
        "ranks": bf.size(),
        "batch_size": args.batch_size,
        "lr": args.lr,
        "epochs": args.epochs,
        "seed": seed,
        **curve[-1],
        "step_ms": elapsed / total / 1e6,
        "hidden_share": max(0.0, 1 - blocked / busy) if busy > 0 else 0.0,
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--optimizer", default="decentlam", help="of: " + ", ".join(OPTIMIZERS))
    parser.add_argument("--topology", default="ring", help="as in `bluefog topo --list`")
    parser.add_argument("--partition", choices=["by-label", "iid"], default="by-label")
    parser.add_argument("--batch-size", type=int, default=512, help="of each rank")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each optimizer")
    parser.add_argument("--no-overlap", action="store_true", help="communicate inside step() only")
    parser.add_argument("--delayed", action="store_true", help="averages come one step later")
    parser.add_argument("--message-dtype", help="bfloat16 or float16: what travels to neighbours")
    parser.add_argument("--json", type=Path, help="write the list of runs here")
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    names = args.optimizer.replace("_", "-").lower().split(",")
    for name in names:
        if name not in OPTIMIZERS:
            parser.error(f"no optimizer '{name}'; there are: {', '.join(OPTIMIZERS)}")
    if args.batch_size < 1 or args.epochs < 1 or args.seeds < 1:
        parser.error("--batch-size, --epochs and --seeds must be at least 1")

    torch.set_num_threads(1)
    bf.init()
    if args.json:  # Before hours of training; on all ranks, so that all end for the same reason.
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.open("a").close()
        except OSError as error:
            give_up(f"--json {args.json} cannot be written: {error.strerror}")
    try:
        bf.set_topology(bf.topology.make(args.topology, bf.size()))
    except ValueError as error:
        give_up(str(error))
    train_set, test_set = load(args.data)
    runs = []
    with tqdm(
        total=len(names) * args.seeds * args.epochs,
        unit="epoch",
        mininterval=2,
        ncols=90,
        disable=bf.rank() != 0,
    ) as progress:
        for seed in range(args.seeds):
            for name in names:
                runs.append(train(name, args, seed, train_set, test_set, progress))
    if bf.rank() != 0:
        return
    print(f"{'optimizer':12}{'seed':>5}{'mean model':>12}{'ranks':>8}{'worst':>8}", end="")
    print(f"{'consensus':>11}{'ms/step':>9}{'hidden':>8}")
    for run in sorted(runs, key=lambda r: names.index(r["optimizer"])):
        print(
            f"{run['optimizer']:12}{run['seed']:5d}{run['acc_mean_model']:12.3f}"
            f"{run['acc_rank_mean']:8.3f}{run['acc_rank_min']:8.3f}{run['consensus']:11.4f}"
            f"{run['step_ms']:9.2f}{run['hidden_share']:8.0%}"
        )
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
