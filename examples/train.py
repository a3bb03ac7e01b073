"""A deep perceptron that every rank trains on data of its own.

bluefog run -np 2 python examples/train.py [--no-overlap | --delayed]
"""

import sys

import torch

import bluefog.torch as bf

STEPS, BATCH, WIDTH, LAYERS = 40, 256, 512, 6


def main() -> None:
    torch.set_num_threads(1)
    bf.init()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.ReLU())))
    optimizer = bf.optim.DecentLaM(
        model.named_parameters(),
        lr=0.1,
        momentum=0.9,
        topology=bf.topology.ring(bf.size()),
        overlap="delayed" if "--delayed" in sys.argv else "--no-overlap" not in sys.argv,
    )
    # Every rank sees its own part of the inputs; all learn the same function of them.
    target = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    torch.manual_seed(1 + bf.rank())
    for step in range(STEPS):
        x = torch.randn(BATCH, WIDTH)
        x[:, bf.rank() :: bf.size()] *= 2.0
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), (x @ target).relu())
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == STEPS - 1:
            losses = bf.allgather(loss.detach())
            if bf.rank() == 0:
                print(f"step {step:3d}  loss of the ranks", " ".join(f"{v:.4f}" for v in losses))
    distance = bf.consensus_distance(model)
    if bf.rank() == 0:
        print(f"the ranks' models are {distance:.4f} apart")


if __name__ == "__main__":
    main()
