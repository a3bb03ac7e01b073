"""What a user is told who makes a mistake: rank, tensor, operation, both values, and what to do.

Nothing hangs and nothing is lost: after each error the same ranks go on.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time

import networkx as nx
import numpy as np
import pytest
from ranks import Job, answers_ctrl_c, environments, on_ranks, run_script, told

import bluefog as bf
import bluefog.topology

N = 4
SMALL, LARGE = 4, 50_000  # Sent at once; sent when the receiver is ready.


def goes_on(names=()):
    """Plain calls work, and so do the names that have just failed."""
    assert (bf.neighbor_allreduce(np.ones(3)) == 1).all()
    for name in names:
        assert (bf.allreduce(np.ones(LARGE), name=name) == 1).all()
    bf.barrier()


# ---- Ranks that disagree.

OPERATIONS = {
    "neighbor_allreduce": {},
    "allreduce": {},
    "broadcast": {"root_rank": 1},
    "allgather": {},
}


@on_ranks(2)
def test_ranks_that_differ_are_told_both_values():
    odd = bf.rank() == 1
    for name, arguments in OPERATIONS.items():
        call = getattr(bf, name)
        for count in (SMALL, LARGE):
            x = np.ones(count, np.float32)
            for what, other in {
                f"float32[{count + 2}]": np.ones(count + 2, np.float32),
                f"float32[2, {count // 2}]": x.reshape(2, -1),
                f"float64[{count}]": x.astype(np.float64),
                f"float16[{count}]": x.astype(np.float16),
                "float32[0]": x[:0],
                "float32[]": x[0],
            }.items():
                told(
                    lambda call=call, x=other if odd else x, a=arguments: call(x, name="w", **a),
                    f"{name} 'w'", "rank 0", "rank 1", f"float32[{count}]", what,
                    "must be equal on all ranks",
                )  # fmt: skip
                goes_on()
            # The name was not spoilt: it stands for what succeeds under it.
            call(x, name="w", **arguments)
            bf.shutdown()
            bf.init()


@on_ranks(2)
def test_memory_order_is_told_too():
    x = np.ones((40, 60))
    for name in ("neighbor_allreduce", "allreduce"):
        mine = np.asfortranarray(x) if bf.rank() == 1 else x
        message = told(
            lambda name=name, mine=mine: getattr(bf, name)(mine, name=name + ".order"),
            f"{name} '{name}.order'", "rank 0", "rank 1", "float64[40, 60] strides (1, 40)",
        )  # fmt: skip
        assert message.count("float64[40, 60]") == 2
    # What has gaps is copied first, and then is like any other.
    gaps = np.ones((40, 120))[:, ::2] if bf.rank() == 1 else x
    assert (bf.allreduce(gaps) == 1).all()
    goes_on()


@on_ranks(2)
def test_operation_root_and_kind_of_sum():
    odd, x = bf.rank() == 1, np.ones(SMALL)
    told(
        lambda: (bf.allgather if odd else bf.allreduce)(x, name="op"),
        "'op'", "rank 0 has allreduce", "rank 1 has allgather",
    )  # fmt: skip
    told(
        lambda: bf.allreduce(x, average=odd, name="sum"),
        "allreduce 'sum'", "rank 0", "rank 1", "the average", "the sum",
    )  # fmt: skip
    told(
        lambda: bf.broadcast(x, int(odd), name="root"),
        "broadcast 'root'", "0 on rank 0", "1 on rank 1",
    )  # fmt: skip
    goes_on(["op", "sum", "root"])


@on_ranks(N)
def test_graphs_that_differ():
    """Ranks 1 and 2 do not agree on the edge between them; others may be through already."""
    bf.set_topology(bf.topology.star(N) if bf.rank() == 1 else bf.topology.ring(N))
    for count in (SMALL, LARGE):
        handle = bf.neighbor_allreduce_nonblocking(np.ones(count), name=f"g{count}")
        # By an edge that one of them does not have, or by the weight of one that both have.
        texts = (f"neighbor_allreduce 'g{count}'", "rank 1", "must ")
        if bf.rank() in (1, 2):
            told(lambda handle=handle: bf.synchronize(handle), *texts)
        else:
            with contextlib.suppress(ValueError):
                bf.synchronize(handle)
        bf.barrier()
    bf.set_topology(bf.topology.ring(N))
    assert (bf.neighbor_allreduce(np.ones(SMALL), name=f"g{SMALL}") == 1).all()
    goes_on()


# ---- Names.


def test_a_name_that_a_rank_never_submits_is_reported_and_then_fails():
    script = """
import numpy as np, bluefog as bf, bluefog.topology, os, time
bf.init()
bf.set_topology(bf.topology.ring(3))
for count in (4, 50_000):
    if bf.rank() != 1:
        start = time.monotonic()
        try:
            bf.neighbor_allreduce(np.ones(count), name=f"lonely{count}")
        except bf.BluefogError as error:
            took = time.monotonic() - start
            assert 0.5 < took < 5, took
            print(error.code, error, flush=True)
    else:
        time.sleep(2.5)
    bf.barrier()
assert (bf.neighbor_allreduce(np.ones(4), name="again") == 1).all()
"""
    results = run_script(3, script, BLUEFOG_STALL_REPORT_MS="400", BLUEFOG_OP_TIMEOUT_MS="1500")
    for r in (0, 2):
        assert results[r].returncode == 0, results[r].stderr
        for count, line in zip((4, 50_000), results[r].stdout.splitlines()):
            assert line.startswith("DEADLINE_EXCEEDED"), line
            for text in (
                f"neighbor_allreduce 'lonely{count}'",
                "same name",
                "BLUEFOG_OP_TIMEOUT_MS",
            ):
                assert text in line, line
            # A rank that is slow to start may be missed too.
            assert re.search(r"waited \d+ s for ranks? (\d, )?1", line), line
            report = (
                rf"stall: neighbor_allreduce 'lonely{count}' waits since .* for ranks? (\d, )?1"
            )
            assert re.search(report, results[r].stderr)


@on_ranks(2)
def test_a_name_in_flight_and_a_name_of_another_tensor():
    if bf.rank() == 0:
        handle = bf.allreduce_nonblocking(np.ones(SMALL), name="twice")
        for again in (bf.allreduce_nonblocking, bf.allgather_nonblocking):
            told(
                lambda again=again: again(np.ones(SMALL), name="twice"),
                "rank 0", "'twice'", "in flight (allreduce float64[4])", "another name",
            )  # fmt: skip
        bf.barrier()
    else:
        bf.barrier()
        handle = bf.allreduce_nonblocking(np.ones(SMALL), name="twice")
    assert (bf.synchronize(handle) == 1).all()
    for other in (np.ones(9), np.ones(SMALL, np.float32), np.ones((2, 2))):
        told(
            lambda other=other: bf.allreduce(other, name="twice"),
            f"rank {bf.rank()}", "allreduce 'twice'", "float64[4]", "use another name",
        )  # fmt: skip
    assert (bf.allreduce(np.ones(SMALL), name="twice") == 1).all()
    goes_on()


@on_ranks(2)
def test_names_of_all_kinds():
    for name in ("größe-模型-🙂", "a\nb", "a\0b", " ", "'", "n" * 100_000):
        assert (bf.allreduce(np.ones(3), name=name) == 1).all()
    told(lambda: bf.allreduce(np.ones(3), name="\ud800"), "rank", "utf-8")
    for name in (3, b"w"):
        told(lambda name=name: bf.allreduce(np.ones(3), name=name), "must be a str", kind=TypeError)
    goes_on()


# ---- Arguments.


@on_ranks(2)
def test_arguments_name_rank_operation_and_value():
    r, x = bf.rank(), np.ones(3)
    here = f"rank {r}: "
    for root in (2, -1, 2**40):
        told(lambda r=root: bf.broadcast(x, r, "w"), here + "broadcast 'w'", str(root), "0..1")
    for root in (None, 1.0, "0"):
        told(lambda r=root: bf.broadcast(x, r), here + "broadcast", repr(root), kind=TypeError)
    for average in (None, "sum"):
        told(lambda a=average: bf.allreduce(x, a), here, repr(average), kind=TypeError)

    def neighbor(kind=ValueError, *texts, **arguments):
        told(
            lambda: bf.neighbor_allreduce(x, name="w", **arguments),
            here + "neighbor_allreduce 'w'", *texts, kind=kind,
        )  # fmt: skip

    dynamic = {"self_weight": 1.0, "src_weights": {}}
    for rank in (2, -1, 2**40):
        neighbor(ValueError, "src_weights", str(rank), self_weight=1.0, src_weights={rank: 1.0})
        neighbor(ValueError, "dst_weights", str(rank), **dynamic, dst_weights=[rank])
    neighbor(ValueError, "itself", **dynamic, dst_weights=[r])
    neighbor(TypeError, "'a'", self_weight="a", src_weights={1 - r: 1.0})
    neighbor(TypeError, f"src_weights[{1 - r}]", self_weight=1.0, src_weights={1 - r: None})
    neighbor(TypeError, "0.5", self_weight=1.0, src_weights={0.5: 1.0})
    neighbor(TypeError, "list", self_weight=1.0, src_weights=[1 - r])
    for ranks in ("1", 1, [None]):
        neighbor(TypeError, "dst_weights", **dynamic, dst_weights=ranks)
    with pytest.raises(ValueError, match=f"rank {r}: neighbor_allreduce: dst_weights"):
        bf.neighbor_allreduce(x, **dynamic, dst_weights=[r])  # Without a name.
    goes_on()


@on_ranks(2)
def test_tensors_that_cannot_be_exchanged():
    here = f"rank {bf.rank()}: "
    for wrong in (None, "abc", 3, 3.0, [1.0], object(), np.array([None]), np.array(["a"]),
                  np.ones(2, complex), np.ones(2, ">f8"), np.ones(2, np.uint32),
                  np.zeros(2, "M8[s]")):  # fmt: skip
        told(lambda x=wrong: bf.broadcast(x, 0, "w"), here, "'w'", "broadcast", kind=TypeError)
    told(lambda: bf.neighbor_allreduce(np.arange(3), name="w"), here, "'w'", "int64")
    told(lambda: bf.allreduce(np.arange(3), name="w"), here, "'w'", "int64[3]", kind=AssertionError)
    told(lambda: bf.allreduce(np.ones(3, bool), average=False), here, "bool")
    # In place: on memory that can be written, without gaps. Plain calls take both.
    fixed = np.frombuffer(b"\0" * 32)
    told(lambda: bf.allreduce_(fixed, name="w"), here, "'w' of allreduce_", "read-only", "copy")
    assert bf.allreduce(fixed).tolist() == [0, 0, 0, 0]
    for gaps in (np.ones((4, 4))[:, ::2], np.ones(4)[::-1]):
        message = told(lambda x=gaps: bf.broadcast_(x, 0, "w"), here, "'w'", "not dense", "strides")
        assert "contiguous" in message
        assert (bf.allreduce(gaps) == 1).all()
    goes_on()


@on_ranks(2)
def test_shapes_for_which_there_is_no_memory():
    for shape in ((-1,), (2**40, 2**40), 2**62, 2**70):
        told(lambda shape=shape: bf.empty(shape), "empty: shape")
    for shape in (None, 2.5, (2.5,), "ab"):
        told(lambda shape=shape: bf.empty(shape), "empty: shape", kind=TypeError)
    told(lambda: bf.empty(2**43), str(2**46), "memory", kind=bf.BluefogError)
    told(lambda: bf.empty(3, complex), "complex128", kind=TypeError)


def test_a_rank_without_memory_is_named_on_all():
    script = """
import resource, numpy as np, bluefog as bf
bf.init(lambda n: bf.topology.ring(n))
x = np.ones(16 << 20, np.float32)
bf.neighbor_allreduce(np.ones(3))
bf.barrier()
if bf.rank() == 1:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20),) * 2)
try:
    bf.neighbor_allreduce(x, name="grad")
except bf.BluefogError as error:
    print(error.code, error, flush=True)
"""
    for rank, result in enumerate(run_script(2, script)):
        assert result.stdout.startswith("RESOURCE_EXHAUSTED"), (rank, result.stdout, result.stderr)
        assert "rank 1: neighbor_allreduce 'grad'" in result.stdout
        assert "no memory" in result.stdout


@on_ranks(2)
def test_one_wrong_tensor_among_parameters():
    """The others are exchanged all the same, and no handle is left behind."""
    from bluefog import _runtime

    params = {"a": np.full(LARGE, float(bf.rank())), "b": np.ones(3 + bf.rank()), "c": np.ones(2)}
    told(
        lambda: bf.broadcast_parameters(params, 1),
        "parameter 'b'", "broadcast", "rank 0", "rank 1", "float64[3]", "float64[4]",
    )  # fmt: skip
    assert (params["a"] == 1).all()
    told(lambda: bf.consensus_distance(params), "parameter 'b'", "float64[3]", "float64[4]")
    params["b"] = np.arange(2)
    told(lambda: bf.allreduce_parameters(params), "parameter 'b'", "int64[2]", kind=AssertionError)
    told(lambda: bf.broadcast_parameters({"b": 3}, 0), "parameter 'b'", "int", kind=TypeError)
    told(lambda: bf.broadcast_parameters({1: np.ones(1), "a": np.ones(1)}, 0), "keys must be str")
    assert not _runtime._handles
    goes_on()


@on_ranks(2)
def test_nothing_is_changed_where_one_tensor_is_wrong():
    r = bf.rank()
    # What a rank can know by itself, it knows before anything is sent.
    params = {"a": np.full(LARGE, float(r)), "b": np.arange(2)}
    told(lambda: bf.allreduce_parameters(params), "parameter 'b'", "int64[2]", kind=AssertionError)
    params["a"][:] = 7.0
    time.sleep(0.05)  # Time for a write that must not come.
    assert (params["a"] == 7.0).all()
    # What only two ranks together know costs nobody the own model.
    params = {"a": np.full(LARGE, float(r)), "b": np.ones(3 + r)}
    for call in (
        lambda: bf.allreduce_parameters(params), lambda: bf.consensus(params).__enter__(),
    ):  # fmt: skip
        told(call, f"rank {r}", "parameter 'b'", "float64[3]", "float64[4]")
        assert (params["a"] == r).all()
    goes_on()


@on_ranks(2)
def test_tied_parameters_are_averaged_once():
    """Two names of one tensor, as tied embeddings have in a state_dict."""
    for _ in range(10):
        tied = np.full(LARGE, float(bf.rank()))
        bf.allreduce_parameters({"a": tied, "b": tied, "c": tied})
        assert (tied == 0.5).all()
        with bf.consensus([("a", tied), ("b", tied)]):
            assert (tied == 0.5).all()


# ---- Graphs.


@on_ranks(N)
def test_wrong_matrices_name_the_entry():
    def matrix(value):
        m = np.full((N, N), 1 / N)
        m[1, 2] = value
        return m

    for value in (-0.5, np.nan, np.inf):
        told(
            lambda value=value: bf.set_topology(matrix(value)),
            "row 1, column 2", f"{value:g}", "finite and not negative",
        )  # fmt: skip
    told(lambda: bf.set_topology(np.eye(N + 1)), "5 nodes", "4 ranks", kind=TypeError)
    for shape in ((N, N + 1), (N,), (0, 0)):
        told(lambda shape=shape: bf.set_topology(np.ones(shape)), str(shape))
    for wrong in (np.eye(N, dtype=complex), np.full((N, N), "a"), [[1.0]], 4):
        told(lambda wrong=wrong: bf.set_topology(wrong), kind=TypeError)
    # Nodes that are not ranks, where the number of nodes is right.
    for node in (N, -1, "a", 3.0):
        graph = nx.DiGraph()
        graph.add_nodes_from([*range(N - 1), node])
        told(lambda graph=graph: bf.set_topology(graph), f"node {node!r}", "0..3")
    graph = nx.complete_graph(N, nx.DiGraph)
    nx.set_edge_attributes(graph, "x", "weight")
    told(lambda: bf.set_topology(graph, True), "edge 0 -> 1", "'x'", kind=TypeError)
    told(lambda: bf.init(3), "topology_fn", "int", kind=TypeError)
    goes_on()


def test_odd_graphs_warn_and_plugins_refuse_them():
    pytest.importorskip("torch")
    script = """
import numpy as np, torch, bluefog.torch as bf
bf.init()
n = bf.size()
leaky = np.full((n, n), 1 / n)
leaky[0, 0] = 0.9
apart = np.eye(n)
for matrix in (leaky, apart):
    assert bf.set_topology(matrix)
    bf.neighbor_allreduce(torch.ones(2))
    for name in ("DSGD", "DmSGD", "DecentLaM"):
        try:
            getattr(bf.optim, name)([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        except ValueError as error:
            print(error)
one_way = bf.topology.ring(n, "right")
for graph in (one_way, bf.topology.one_peer_exponential(n)):
    try:
        bf.optim.DecentLaM([torch.nn.Parameter(torch.ones(2))], lr=0.1, topology=graph)
    except ValueError as error:
        print(error)
"""
    results = run_script(3, script)
    for result in results:
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert len(lines) == 8
        for line, name in zip(lines, ("dsgd", "dmsgd", "decentlam") * 2):
            assert f"optimizer '{name}' cannot run" in line and "3 ranks" in line
        assert all(re.search(r"column 0.*1\.56\d+ instead of 1", line) for line in lines[:3])
        assert all("no path leads from rank 0 to rank 1" in line for line in lines[3:6])
        assert "W[0][1] = 0.5 but W[1][0] = 0" in lines[6]
        assert "changes with time" in lines[7]
    assert re.search(r"column 0 sums to 1\.56\d+ instead of 1", results[0].stderr)
    assert "no path leads from rank 0 to rank 1" in results[0].stderr


# ---- Before, after and beside.


def test_before_init_and_after_shutdown():
    script = """
import numpy as np, bluefog as bf, threading, time
def refused():
    for call in (bf.rank, bf.size, bf.barrier, bf.stats, bf.launched_by, bf.set_topology,
                 lambda: bf.allreduce(np.ones(2)), lambda: bf.empty(2),
                 lambda: bf.broadcast_parameters([], 0), lambda: bf.consensus_distance([]),
                 lambda: bf.synchronize(1), lambda: bf.poll(1)):
        try:
            call()
        except ValueError as error:
            assert error.code == "FAILED_PRECONDITION" and "bf.init()" in str(error), error
        else:
            raise SystemExit("not refused")
    assert bf.load_topology() is None and bf.in_neighbor_ranks() == []
refused()
bf.init()
handle = bf.allreduce_nonblocking(np.ones(3))
bf.synchronize(handle)
if bf.rank() == 0:            # Its partner never comes: whoever waits hears of the shutdown.
    heard = []
    def wait():
        try:
            bf.allreduce(np.ones(3), name="never")
        except bf.BluefogError as error:
            heard.append(str(error))
    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    bf.shutdown()
    thread.join(10)
    assert "'never'" in heard[0] and "shut down" in heard[0], heard
else:
    time.sleep(0.5)
    bf.shutdown()
refused()
bf.init()
assert bf.allreduce(np.array([float(bf.rank())]))[0] == 0.5
try:
    bf.synchronize(handle)
except ValueError as error:
    assert f"handle {handle}" in str(error)
"""
    for result in run_script(2, script):
        assert result.returncode == 0, result.stderr + result.stdout


def test_a_hundred_jobs_one_after_the_other_and_two_at_once():
    script = """
import os, numpy as np, bluefog as bf
def usage():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
for i in range(100):
    bf.init()
    assert bf.allreduce(np.full(10, float(bf.rank() + i)))[0] == i + 0.5
    if i % 10 == 0:
        assert (bf.neighbor_allreduce(np.ones(50_000)) == 1).all()
    bf.shutdown()
    if i == 20:
        early = usage()
late = usage()
assert late[0] <= early[0] + 3 and late[1] <= early[1] + 8, (early, late)
"""
    results = {}
    jobs = [
        threading.Thread(target=lambda k=k: results.update({k: run_script(2, script)}))
        for k in range(2)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    for result in results[0] + results[1]:
        assert result.returncode == 0, result.stderr


def test_torchruns_port_may_be_in_use():
    """torchrun itself listens there."""
    import socket

    code = "import bluefog as bf; bf.init(); bf.barrier(); print(bf.rank(), bf.launched_by())"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env={**environments(1)[0], "RANK": str(r), "WORLD_SIZE": "2",
                     "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "2",
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for r in range(2)
        ]  # fmt: skip
        for r, p in enumerate(ranks):
            out, _ = p.communicate(timeout=60)
            assert (p.returncode, out) == (0, f"{r} torchrun\n")


# ---- Who belongs to a job.


def _run_each(environment_of_ranks, timeout=60):
    """(exit code, standard output, standard error, seconds) of each rank that only joins."""
    code = "import bluefog as bf; bf.init(); bf.barrier(); print('joined')"
    start = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for env in environment_of_ranks
    ]  # fmt: skip
    results = []
    for p in ranks:
        out, err = p.communicate(timeout=timeout)
        results.append((p.returncode, out, err, time.monotonic() - start))
    return results


def _token_file(folder, name, text, mode=0o600):
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_job_with_a_token(tmp_path):
    token = _token_file(tmp_path, "token", "0123456789abcdef" * 4 + "\n")
    other = _token_file(tmp_path, "other", "fedcba9876543210" * 4)
    envs = environments(2, BLUEFOG_TOKEN_FILE=token, BLUEFOG_JOIN_TIMEOUT_MS="5000")
    assert [r[:2] for r in _run_each(envs)] == [(0, "joined\n")] * 2
    # A rank without it, or with another one, hears why at once; rank 0 says whom it refused.
    for wrong in ({"BLUEFOG_TOKEN_FILE": other}, {"BLUEFOG_TOKEN_FILE": ""}):
        zero, one = _run_each([envs[0], {**envs[1], **wrong}])
        assert one[0] != 0 and "rank 1 cannot join" in one[2]
        assert "the job token is missing or not the same on all ranks" in one[2]
        assert "BLUEFOG_TOKEN_FILE" in one[2]
        assert zero[0] != 0 and "did not join in time: 1" in zero[2]
        assert "came as rank 1 and was refused: its job token is missing" in zero[2]
        for secret in ("0123456789abcdef", "fedcba9876543210"):
            assert secret not in zero[2] + one[2]


def test_token_files_that_cannot_be(tmp_path):
    for name, text, mode, expected in (
        ("open", "ab" * 32, 0o644, "has mode 0644, so that others"),
        ("short", "secret", 0o600, "64 hexadecimal digits or 32 bytes"),
        ("missing", None, 0o600, "No such file"),
    ):
        path = str(tmp_path / name)
        if text is not None:
            _token_file(tmp_path, name, text, mode)
        env = environments(2, BLUEFOG_TOKEN_FILE=path)[1]
        [(code, _, error, took)] = _run_each([env])
        assert code != 0 and expected in error and path in error, error
        assert "secret" not in error and took < 30


def test_a_token_is_inherited_by_descriptor_and_needed_outside_loopback(tmp_path):
    with open(_token_file(tmp_path, "token", "5a" * 32)) as token:
        code = "import bluefog as bf\nfor _ in range(3):\n bf.init(); bf.barrier(); bf.shutdown()"
        envs = environments(2, BLUEFOG_TOKEN_FD=str(token.fileno()))
        ranks = [
            subprocess.Popen([sys.executable, "-c", code], env=env, pass_fds=[token.fileno()])
            for env in envs
        ]
        assert [p.wait(60) for p in ranks] == [0, 0]
    # A closed descriptor, as Python's subprocess leaves it.
    [(code, _, error, _)] = _run_each([{**envs[1], "BLUEFOG_TOKEN_FD": "99"}])
    assert code != 0 and "BLUEFOG_TOKEN_FD=99 is no open descriptor" in error
    # torchrun's variables for several hosts (nothing is sent to that address).
    torchrun = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "192.0.2.77", "MASTER_PORT": "29500"}  # fmt: skip
    for code, _, error, _ in _run_each(
        [{**environments(1)[0], **torchrun, "RANK": rank} for rank in "01"]
    ):
        assert code != 0 and "192.0.2.77:29501 can be reached from the network" in error
        assert "BLUEFOG_TOKEN_FILE" in error and "/dev/urandom" in error


def test_strangers_do_not_harm_a_running_job():
    import socket

    script = """
import os, sys, threading, numpy as np, bluefog as bf
stop = np.zeros(1)
def watch():
    sys.stdin.read()
    stop[0] = 1
bf.init()
if bf.rank() == 0:
    print(os.environ["BLUEFOG_COORDINATOR"], flush=True)
    threading.Thread(target=watch, daemon=True).start()
steps = 0
while bf.allreduce(stop, average=False)[0] == 0:
    assert (bf.neighbor_allreduce(np.ones(10_000)) == 1).all()
    steps += 1
    if steps % 100 == 0 and bf.rank() == 0:
        print(steps, flush=True)
print("done", flush=True)
"""
    job = Job(2, script)
    zero = job.processes[0]
    host, port = zero.stdout.readline().rsplit(":", 1)

    def connect():
        return socket.create_connection((host, int(port)), timeout=20)

    def closed(connection):
        with contextlib.suppress(ConnectionError):
            while connection.recv(1 << 16):
                pass
        return True

    for sent in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(1 << 20),
        os.urandom(1 << 20),
        b"BFCTRL01" + bytes(32) + b"\0\0\0\0\xff\xff",
        b"\x16\x03\x01" + os.urandom(200),
    ):
        with connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
            assert closed(connection)
    idle = [connect() for _ in range(1500)]
    for connection in idle[::2]:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"BFCTRL01")
    before = zero.stdout.readline()
    assert int(zero.stdout.readline()) > int(before)  # It trains on.
    for connection in idle:
        assert closed(connection)
        connection.close()
    zero.stdin.close()
    zero.stdin = None
    for rank, result in enumerate(job.wait()):
        assert result.returncode == 0 and result.stdout.endswith("done\n"), (rank, result.stderr)


def test_ctrl_c_ends_a_shutdown_that_waits():
    """Rank 0 sent something that rank 1 does not take."""
    script = """
import os, sys, numpy as np, bluefog as bf
bf.init()
bf.barrier()
if bf.rank() == 1:
    sys.exit(sys.stdin.read())
bf.broadcast_nonblocking(np.ones(100), 0)
print("waiting", flush=True)
try:
    bf.shutdown()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    os._exit(0)
print("was through", flush=True)
"""
    answers_ctrl_c(script)


def test_nothing_is_left_when_a_rank_is_killed_in_the_middle():
    """Whatever it was doing: all others are told of it within two seconds, twice."""
    script = """
import itertools, time, numpy as np, bluefog as bf, bluefog.topology
bf.init()
bf.set_topology(bf.topology.ring(bf.size()))
big = np.zeros(1_000_000)
calls = itertools.cycle((lambda: bf.neighbor_allreduce(big), lambda: bf.allreduce(big),
                         lambda: bf.broadcast(big, 1), lambda: bf.allgather(big[:5000]),
                         bf.barrier))
print("ready", flush=True)
try:
    for call in calls:
        call()
except bf.BluefogError as error:
    print(time.time(), error.code, error, flush=True)
try:
    bf.barrier()
except bf.BluefogError as error:
    print(time.time(), error.code, error, flush=True)
"""

    def files():
        names = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
        return names | {f"/tmp/{name}" for name in os.listdir("/tmp") if "bluefog" in name}

    before = files()
    for victim, delay in ((0, 0.05), (1, 0.1), (2, 0.2)):
        job = Job(3, script)
        for p in job.processes:
            assert p.stdout.readline() == "ready\n"
        time.sleep(delay)
        killed = time.time()
        job.processes[victim].kill()
        for rank, result in enumerate(job.wait(20)):
            if rank == victim:
                continue
            lines = result.stdout.splitlines()
            assert result.returncode == 0 and len(lines) == 2, result.stderr
            for line in lines:
                when, code, text = line.split(maxsplit=2)
                assert code == "UNAVAILABLE" and f"rank {victim}" in text
                assert float(when) - killed < 2
    assert files() <= before
