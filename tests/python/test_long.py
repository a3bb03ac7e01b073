"""Runs of minutes; only with ``ci/test.sh --full``. BLUEFOG_SOAK_S makes the soak longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"

SOAK = """
import ctypes, gc, os, random, time
import numpy as np
import torch
import bluefog.torch as bf

seconds = float(os.environ["SOAK_S"])
bf.init()
rank, n = bf.rank(), bf.size()
together = random.Random(0)  # Draws the same on every rank.
alone = random.Random(rank)
graphs = [bf.topology.ring(n), bf.topology.exponential(n), bf.topology.star(n),
          bf.topology.fully_connected(n)]
sizes = [0, 1, 777, 5_000, 300_000]
torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.Tanh(), torch.nn.Linear(300, 10))
bf.broadcast_parameters(model.state_dict(), root_rank=0)

def optimizer():
    return bf.optim.DecentLaM(model.parameters(), lr=0.01, momentum=0.9,
                              topology=bf.topology.ring(n))

def used():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # What is free may still be the process's.
    pages = int(open("/proc/self/statm").read().split()[1])
    return (pages * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")))

def check(work, want, what):
    got = bf.synchronize(work).double().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5, err_msg=f"rank {rank}, {what}")

def operations(tag, W):
    # (what, how to submit, what must come out), by name, so that each rank may choose its order.
    for k in range(8):
        kind = together.choice(["neighbor_allreduce", "allreduce", "broadcast", "allgather"])
        size = together.choice(sizes)
        values = [together.randrange(-1000, 1000) for _ in range(n)]
        name = f"{kind} {size} {k}"
        arena = alone.random() < 0.3
        x = bf.empty((size,)) if arena else torch.empty(size)
        x.fill_(values[rank])
        if kind == "neighbor_allreduce":
            want = np.full(size, W[:, rank] @ np.array(values, float))
        elif kind == "allreduce":
            want = np.full(size, np.mean(values))
        elif kind == "broadcast":
            want = np.full(size, values[k % n])
        else:
            want = np.repeat(np.array(values, float), size)
        keywords = {"root_rank": k % n} if kind == "broadcast" else {}
        yield name, getattr(bf, kind + "_nonblocking"), x, keywords, want

opt = optimizer()
begin, steps, rounds, before = time.monotonic(), 0, 0, None
while True:
    elapsed = time.monotonic() - begin
    state = torch.tensor([0.0 if elapsed < seconds / 4 else 1.0 if elapsed < seconds else 2.0])
    phase = int(bf.broadcast(state, root_rank=0).item())
    # Without an engine, so that it is not asked what its pools hold just now.
    if phase == 2 or (phase == 1 and before is None) or rounds % 100 == 99:
        distance = bf.consensus_distance(model.parameters())
        assert distance < 1.0, distance
        opt = todo = works = work = want = loss = None  # The tensors of the last round.
        bf.shutdown()
        after = used()
        if phase == 2:
            break
        if phase == 1 and before is None:
            before = after
        bf.init()
        opt = optimizer()
    graph = together.choice(graphs)
    bf.set_topology(graph)
    todo = list(operations(rounds, graph.to_matrix()))
    alone.shuffle(todo)
    works = []
    for name, submit, x, keywords, want in todo:
        works.append((submit(x, name=name, **keywords), want, name))
        if alone.random() < 0.02:
            time.sleep(0.003)
    alone.shuffle(works)
    for work, want, name in works:
        check(work, want, name)
    for _ in range(2):
        opt.zero_grad()
        loss = model(torch.randn(16, 64)).square().mean()
        loss.backward()
        opt.step()
        steps += 1
    rounds += 1
print(f"rank {rank}: {rounds} rounds, {steps} steps, memory {before[0] >> 10} -> {after[0] >> 10} "
      f"KiB, descriptors {before[1]} -> {after[1]}, threads {before[2]} -> {after[2]}")
assert after[0] - before[0] < 16 << 20, (before, after)
assert after[1] <= before[1] + 2 and after[2] <= before[2], (before, after)
assert rounds > 20
"""


@pytest.mark.long
@pytest.mark.timeout(0)
def test_soak_stays_right_and_flat():
    seconds = float(os.environ.get("BLUEFOG_SOAK_S", "90"))
    for result in run_script(4, SOAK, timeout=2 * seconds + 120, SOAK_S=str(seconds)):
        assert result.returncode == 0, result.stderr
        print(result.stdout, end="")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_demo_shows_the_bias_of_momentum_and_its_cure(tmp_path):
    demo = [sys.executable, str(EXAMPLES / "demo.py"), "--out", str(tmp_path)]
    result = subprocess.run(demo, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "demo.png").stat().st_size > 10_000
