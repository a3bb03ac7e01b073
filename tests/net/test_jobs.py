"""Jobs over several hosts: right values over a bad network, prompt errors over a broken one."""

import signal
import time

import pytest
from ranks import TIMEOUT, Job

# What is asked for is 0.1 s and 2 s; the rest is for a busy machine. benchmarks/net/detection.py
# measures.
DEATH, SILENCE = 1.5, 4.0

# Averages with both neighbours on a ring until something breaks, or `steps` times. Tells when it
# begins, and how it ended.
RING = """
import sys, time, numpy as np, bluefog as bf
bf.init(bf.topology.ring)
r, n = bf.rank(), bf.size()
around = {(r - 1) % n, r, (r + 1) % n}
want = sum(around) / len(around)
x = np.full(COUNT, float(r), np.float32)
print("going", flush=True)
try:
    for step in range(STEPS):
        y = bf.neighbor_allreduce(x, name="x")
        assert np.allclose(y, want, rtol=1e-6), (step, y[:3], want)
    print("complete")
except bf.BluefogError as error:
    print(time.monotonic(), error.code, error)
"""


def ring(count=30_000, steps=10**9):
    return RING.replace("COUNT", str(count)).replace("STEPS", str(steps))


def started(lab, script, **extra):
    """The job, once every rank is at work."""
    job = Job(lab.size, script, lab, **extra)
    deadline = time.monotonic() + TIMEOUT
    for rank, p in enumerate(job.processes):
        assert job._read_line(p, deadline) == "going\n", job.errors(rank)
    return job


def raised(job, since, within, ranks, *named):
    """Each of ``ranks`` ended with an error that names something, in time."""
    results = job.wait()
    for rank in ranks:
        r = results[rank]
        assert r.returncode == 0, f"rank {rank}: {r.stderr[-3000:]}"
        when, text = r.stdout.strip().split(" ", 1)
        assert text.startswith("UNAVAILABLE"), text
        assert float(when) - since < within, f"rank {rank} after {float(when) - since} s: {text}"
        assert any(name in text for name in named), f"rank {rank}: none of {named} in {text}"


def test_memory_inside_hosts_and_the_network_between_them(make_lab):
    script = """
import numpy as np, bluefog as bf
bf.init(bf.topology.exponential)
r, n = bf.rank(), bf.size()
for count in (0, 1, 1001, 300_000):
    x = np.full(count, float(r))
    y = bf.neighbor_allreduce(x, name=f"neighbours{count}")
    sources = [(r - 2**k) % n for k in range(3)]
    assert np.allclose(y, (r + sum(sources)) / 4), (count, y[:3])
    z = bf.allreduce(x, name=f"all{count}")
    assert np.allclose(z, (n - 1) / 2), (count, z[:3])
    assert np.all(bf.broadcast(x, 5, name=f"root{count}") == 5)
    assert np.array_equal(bf.allgather(x, name=f"gather{count}"), np.repeat(np.arange(n), count))
print("right")
"""
    results = Job(8, script, make_lab(hosts=2, ranks_per_host=4)).wait()
    assert [(r.returncode, r.stdout) for r in results] == [(0, "right\n")] * 8, results


@pytest.mark.timeout(240)
@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
def test_a_model_trains_over_two_hosts(make_lab, ipv6):
    """Bit for bit what it trains to inside one host."""
    pytest.importorskip("torch")
    script = """
import hashlib, torch, bluefog.torch as bf
bf.init(bf.topology.ring)
torch.manual_seed(bf.rank())
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
optimizer = bf.optim.DecentLaM(model.named_parameters(), lr=0.05, momentum=0.9)
data, target = torch.randn(32, 64), torch.randn(32, 8)
for _ in range(20):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(data), target).backward()
    optimizer.step()
bits = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
print(hashlib.sha256(bits).hexdigest())
"""
    lab = make_lab(hosts=2, ranks_per_host=2)
    extra = {"BLUEFOG_COORDINATOR": f"[{lab.hosts[0].ipv6}]:19999"} if ipv6 else {}
    # One after the other: PyTorch takes seconds to import.
    ends = Job(4, script).wait(100), Job(4, script, lab, **extra).wait(100)
    for results in ends:
        assert [r.returncode for r in results] == [0] * 4, [r.stderr[-2000:] for r in results]
    assert [r.stdout for r in ends[0]] == [r.stdout for r in ends[1]]


@pytest.mark.xfail(reason="a rank that leaves does not wait until what it sent has arrived")
def test_lost_packets_cost_time_only(make_lab):
    lab = make_lab(hosts=2, ranks_per_host=2)
    lab.loss(5)
    results = Job(4, ring(count=50_000, steps=20), lab).wait(100)
    assert [r.returncode for r in results] == [0] * 4, [r.stderr[-2000:] for r in results]
    assert [r.stdout for r in results] == ["going\ncomplete\n"] * 4
    assert lab.lost() > 20


def test_a_delay_changes_no_value(make_lab):
    lab = make_lab(hosts=2, ranks_per_host=1)
    lab.delay(0.02)
    results = Job(2, ring(count=200_000, steps=5), lab).wait()
    assert [r.stdout for r in results] == ["going\ncomplete\n"] * 2, [r.stderr for r in results]


@pytest.mark.parametrize("count", [100, 2_000_000])
def test_a_link_that_is_cut_is_an_error_everywhere(make_lab, count):
    """On both sides, and on ranks that have no neighbour over there."""
    lab = make_lab(hosts=2, ranks_per_host=4)
    job = started(lab, ring(count))
    time.sleep(0.3)  # Into the middle of things.
    lab.cut(1)
    cut = time.monotonic()
    raised(job, cut, SILENCE, range(4), *[f"rank {r}" for r in range(4, 8)])
    raised(job, cut, SILENCE, range(4, 8), *[f"rank {r}" for r in range(4)])


def test_a_link_between_two_hosts_of_three_is_cut(make_lab):
    """Neither of them is the coordinator's, which goes on hearing from both."""
    lab = make_lab(hosts=3)
    job = started(lab, ring())
    lab.cut(1, 2)
    raised(job, time.monotonic(), SILENCE, range(3), "rank 1", "rank 2")


@pytest.mark.xfail(reason="TCP sends the heartbeat again as late as 1.8 s after it was lost")
@pytest.mark.parametrize("count", [100, 500_000])
def test_a_link_that_is_healed_in_time_goes_on(make_lab, count):
    lab = make_lab(hosts=2, ranks_per_host=2)
    script = ring(count).replace(
        "for step in range(1000000000)",
        """
    end = time.monotonic() + 4
    step = 0
    while bf.allreduce(np.float64([time.monotonic() < end]), name="go")[0] == 1""".strip(),
    )
    job = started(lab, script)
    time.sleep(0.3)
    lab.cut(1)
    time.sleep(1)
    lab.heal(1)
    results = job.wait()
    for rank, r in enumerate(results):
        assert (r.returncode, r.stdout) == (0, "complete\n"), f"{rank}: {r.stdout} {r.stderr}"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", [0, 3], ids=["coordinator", "other"])
def test_a_dead_rank_is_named_on_all_hosts(make_lab, how, victim):
    lab = make_lab(hosts=2, ranks_per_host=2)
    job = started(lab, ring())
    job.processes[victim].send_signal(how)
    since = time.monotonic()
    others = [r for r in range(4) if r != victim]
    # A stopped process must not be waited for, not even in shutdown().
    for p in job.processes:
        if p is not job.processes[victim]:
            p.wait(SILENCE + 10)
    job.processes[victim].kill()
    raised(job, since, DEATH if how == signal.SIGKILL else SILENCE, others, f"rank {victim}")
