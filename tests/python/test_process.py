"""Processes: how they end, are interrupted, forked and killed."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from ranks import answers_ctrl_c, environments, free_port, run_script

import bluefog as bf


def ends_well(results):
    for rank, result in enumerate(results):
        assert result.returncode == 0, f"rank {rank}: {result.stderr[-3000:]}"
    return [result.stdout for result in results]


def test_scripts_need_no_shutdown_and_end_at_different_times():
    """Whoever is through leaves at once; what it sent last still counts."""
    script = """
import numpy as np, bluefog as bf
bf.init()
for i in range(3):
    x = bf.broadcast(np.full(10, i * bf.rank()), 2)
    assert x[0] == 2 * i
    y = bf.neighbor_allreduce(np.ones(3))
if bf.rank() > 0:
    bf.neighbor_allreduce(y, self_weight=1.0, src_weights={3 - bf.rank(): 1.0},
                          dst_weights=[3 - bf.rank()])
"""
    for _ in range(3):
        ends_well(run_script(3, script))


def test_an_error_on_one_rank_ends_the_others():
    script = """
import numpy as np, bluefog as bf
bf.init()
bf.barrier()
if bf.rank() == 1:
    raise SystemExit(3)
try:
    bf.allreduce(np.ones(10_000))
except bf.BluefogError as error:
    print(error.code, error)
"""
    results = run_script(2, script)
    assert [r.returncode for r in results] == [0, 3]
    assert results[0].stdout.startswith("UNAVAILABLE")
    assert "rank 1" in results[0].stdout and "allreduce" in results[0].stdout


@pytest.mark.parametrize("where", ["plain", "optimizer"])
def test_killed_rank_is_named_within_two_seconds(where):
    if where == "optimizer":
        pytest.importorskip("torch")
        script = """
import torch, bluefog.torch as bf
bf.init()
bf.set_topology(bf.topology.ring(4))
x = torch.nn.Parameter(torch.zeros(300_000))
optimizer = bf.optim.DSGD([("x", x)], lr=0.1)
def step():
    optimizer.zero_grad()
    x.sum().backward()
    optimizer.step()
"""
    else:
        script = """
import numpy as np, bluefog as bf, bluefog.topology
bf.init()
bf.set_topology(bf.topology.ring(4))
def step():
    bf.neighbor_allreduce(np.zeros(300_000))
"""
    script += """
import os, time, signal
step()
bf.barrier()
if bf.rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
start = time.monotonic()
try:
    while True:
        step()
except bf.BluefogError as error:
    assert time.monotonic() - start < 2, time.monotonic() - start
    print(error.code, error)
try:                                        # It stays so, and nothing hangs.
    bf.barrier()
except bf.BluefogError as error:
    print(error.code, error)
"""
    results = run_script(4, script)
    assert results[1].returncode == -signal.SIGKILL
    for r in (0, 2, 3):
        lines = results[r].stdout.splitlines()
        assert results[r].returncode == 0, results[r].stderr[-2000:]
        assert len(lines) == 2
        assert all(line.startswith("UNAVAILABLE") and "rank 1" in line for line in lines), lines


def test_ctrl_c_on_the_way_to_a_consensus_leaves_the_model():
    script = """
import signal, sys, time, numpy as np, bluefog as bf
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
bf.init()
model = [np.full(100_000, float(bf.rank()))]
bf.barrier()
try:
    if bf.rank() == 0:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    else:
        time.sleep(1.0)  # So that rank 0 is interrupted while it waits for this one.
    with bf.consensus(model):
        print("inside", model[0][0] == 0.5)
except KeyboardInterrupt:
    print("interrupted", (model[0] == bf.rank()).all())
bf.barrier()
print((model[0] == bf.rank()).all())
"""
    results = run_script(2, script)
    assert [r.stdout.split() for r in results] == [
        ["interrupted", "True", "True"], ["inside", "True", "True"],
    ], [r.stderr for r in results]  # fmt: skip


def test_an_operation_that_ends_with_a_slice_of_its_wait():
    """Waits look at signals every 100 ms; an end at that very moment is an end like any other."""
    script = """
import time, numpy as np, bluefog as bf
bf.init()
for i in range(60):
    bf.barrier()
    if bf.rank() == 1:
        time.sleep(0.0990 + 0.00002 * i)
    assert (bf.allreduce(np.ones(3)) == 1).all()
"""
    assert [r.returncode for r in run_script(2, script)] == [0, 0]


def test_the_engine_goes_on_while_python_does_not():
    """Rank 1 holds the GIL; what rank 0 waits for comes from its background thread."""
    script = """
import ctypes, time, numpy as np, bluefog as bf
bf.init()
x = np.full(1_000_000, float(bf.rank()))
bf.allreduce(x, name="warm")
bf.barrier()
start = time.monotonic()
handle = bf.neighbor_allreduce_nonblocking(x, name="large")
if bf.rank() == 1:
    ctypes.PyDLL(None).usleep(3_000_000)  # Computes in Python, as it were: PyDLL keeps the GIL.
y = bf.synchronize(handle)
print((y == 0.5).all(), time.monotonic() - start < 2.0)
"""
    results = run_script(2, script)
    assert [r.stdout.split() for r in results] == [["True", "True"], ["True", "False"]]


@pytest.mark.parametrize("where", ["init", "wait", "make", "step"])
def test_ctrl_c_answers_within_200_ms(where):
    """Rank 1 never takes part; rank 0 waits and is interrupted."""
    setup, ready = "import numpy as np, bluefog as bf", ""
    wait = "bf.allreduce(np.ones(10))"
    if where in ("make", "step"):
        pytest.importorskip("torch")
        setup = "import torch, bluefog.torch as bf"
        ready = "optimizer = bf.optim.DSGD([torch.nn.Parameter(torch.ones(9))], lr=0.1)"
        wait = "optimizer.step()"
        if where == "make":
            ready, wait = "", ready
    script = f"""
import os, sys
{setup}
absent = os.environ["BLUEFOG_RANK"] == "1"
if absent and {where!r} == "init":
    sys.exit(sys.stdin.read())
if {where!r} != "init":
    bf.init()
    {ready}
    bf.barrier()
    if absent:
        sys.exit(sys.stdin.read())
try:
    print("waiting", flush=True)
    bf.init()
    {wait}
except KeyboardInterrupt:
    print("interrupted", flush=True)
    os._exit(0)
"""
    answers_ctrl_c(script)


def test_forked_children_raise_and_leave_the_parent_alone():
    script = """
import os, sys, numpy as np, bluefog as bf
try:
    import bluefog.torch as torch
    from torch import nn, zeros
    parameter = nn.Parameter(zeros(3))
except ImportError:
    torch = None
bf.init()
handle = bf.allreduce_nonblocking(np.ones(1000))
y = bf.neighbor_allreduce(np.ones(5))
pid = os.fork()
if pid == 0:
    calls = (bf.barrier, lambda: bf.allreduce(np.ones(3)), lambda: bf.synchronize(handle),
             bf.rank, bf.init, bf.stats, lambda: bf.empty(3))
    for call in calls:
        try:
            call()
        except bf.BluefogError as error:
            assert "forked" in str(error) and error.code == "FAILED_PRECONDITION", error
        else:
            os._exit(7)
    if torch:
        for make in (torch.optim.DSGD, torch.optim.DecentLaM):
            try:
                make([parameter], lr=0.1)
            except bf.BluefogError as error:
                assert "forked" in str(error), error
            else:
                os._exit(8)
    y[:] = 3                               # Memory stays usable.
    del handle, y
    sys.exit(5)                            # With all exit handlers.
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
assert (bf.synchronize(handle) == 1).all()
assert (y == 1).all()
bf.barrier()
"""
    ends_well(run_script(2, script))


def test_child_forked_before_init_may_init():
    script = """
import os, numpy as np, bluefog as bf
pid = os.fork()
if pid == 0:
    bf.init()
    assert bf.allreduce(np.ones(3)).sum() == 3
    bf.shutdown()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
bf.init()
"""
    ends_well(run_script(1, script))


def test_data_loader_with_forked_workers():
    pytest.importorskip("torch")
    script = """
import torch, bluefog.torch as bf
bf.init()
model = torch.nn.Linear(4, 1)
optimizer = bf.optim.DSGD(model.named_parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(torch.randn(64, 4))
loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=2,
                                     multiprocessing_context="fork")
steps = 0
for epoch in range(2):
    for (x,) in loader:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        steps += 1
print(steps)
"""
    assert ends_well(run_script(2, script)) == ["16\n", "16\n"]


def test_threads_may_wait_at_the_same_time():
    """The GIL is free in every wait: another thread of the same rank completes the exchange."""
    script = """
import threading, numpy as np, bluefog as bf
bf.init()
results = {}
def run(i):
    for k in range(20):
        results[i, k] = bf.allreduce(np.full(3000 * i + 1, float(i)), name=f"{i}.{k}")[0]
threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert all(results[i, k] == i for i in range(4) for k in range(20))
"""
    ends_well(run_script(2, script))


def test_missing_rank_and_malformed_settings():
    env = environments(2, BLUEFOG_JOIN_TIMEOUT_MS="500")[0]
    code = "import bluefog as bf; bf.init()"
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 1
    assert "BluefogError" in result.stderr and "did not join" in result.stderr
    env = {**environments(1)[0], "BLUEFOG_CHUNK_BYTES": "many"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30
    )
    assert "BluefogValueError" in result.stderr
    assert "BLUEFOG_CHUNK_BYTES" in result.stderr and "many" in result.stderr


def test_port_taken():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = environments(2, BLUEFOG_JOIN_TIMEOUT_MS="2000")[0]
        env["BLUEFOG_COORDINATOR"] = f"127.0.0.1:{port}"
        result = subprocess.run(
            [sys.executable, "-c", "import bluefog as bf; bf.init()"],
            env=env,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert result.returncode == 1 and str(port) in result.stderr
    assert "BluefogError" in result.stderr


def test_torchrun():
    pytest.importorskip("torch")
    # The ranks share a pipe: a line goes out in one write, or they may write into each other's.
    code = """
import os, bluefog as bf
bf.init()
os.write(1, f"{bf.rank()} {bf.size()} {bf.launched_by()}\\n".encode())
"""
    env = environments(1)[0]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         f"--master-port={free_port()}", "--no-python", sys.executable, "-c", code],
        env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["0 2 torchrun", "1 2 torchrun"]


@pytest.mark.skipif(shutil.which("bluefog") is None, reason="the bluefog command is not installed")
def test_bluefog_run():
    code = "import bluefog as bf; bf.init(); bf.barrier(); print(bf.size(), bf.launched_by())"
    result = subprocess.run(
        ["bluefog", "run", "-np", "2", sys.executable, "-c", code],
        env={**os.environ, "BLUEFOG_LOG_LEVEL": "warn"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 bluefog run") == 2


def test_nothing_is_loaded_that_was_not_asked_for():
    """Importing bluefog needs NumPy alone."""
    code = (
        "import sys, bluefog, bluefog.topology, bluefog.viz\n"
        "heavy = {'torch', 'networkx', 'matplotlib', 'tensorflow', 'jax'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert bf.__version__


def test_a_rank_that_is_through_stays_for_those_that_are_late():
    script = """
import time, numpy as np, bluefog as bf
bf.init(lambda n: bf.topology.ring_right(n))
if bf.rank() == 1:
    time.sleep(1.5)
print(bf.neighbor_allreduce(np.full(300_000, bf.rank(), float), name="last")[-1])
"""
    ranks = run_script(2, script, BLUEFOG_STALL_REPORT_MS="300")
    assert [p.stdout for p in ranks] == ["0.5\n", "0.5\n"], [p.stderr for p in ranks]


def test_the_launcher_returns_the_code_of_the_cause_and_not_of_its_consequence():
    script = """
import sys, numpy as np, bluefog as bf
bf.init()
bf.barrier()
if bf.rank() == 1:
    sys.exit(77)
bf.allreduce(np.ones(3))
"""
    for _ in range(4):
        command = ["bluefog", "run", "-np", "4", sys.executable, "-c", script]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 77, result.stderr
        assert "rank 1 failed with exit code 77" in result.stderr
