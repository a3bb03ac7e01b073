"""64 MiB from one rank to another by the loopback device: bluefog over UCX, UCX alone, sockets.

UCX alone is ``ucx_perftest`` (Debian: ``apt-get install ucx-utils``), active messages of the size
of our chunks, with our settings of TCP. All go one way; ours is a broadcast, which waits for the
receiver's release.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench

OURS, UCX, SOCKETS = "bluefog over UCX", "ucx_perftest", "plain sockets"
CHUNK = 256 << 10
# What bluefog sets (transport/ucx/ucx.cc) and matters here.
UCX_ENV = {
    "UCX_TLS": "tcp",
    "UCX_NET_DEVICES": "lo",
    "UCX_TCP_TX_SEG_SIZE": "512k",
    "UCX_TCP_RX_SEG_SIZE": "512k",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}


def body(rank: bench.Rank, size: int, rounds: int) -> list[float]:
    """MB/s of each round. Rank 0 also runs the others while rank 1 sleeps at the barrier."""
    import torch

    rank.open(64, blocked=True)
    bf = rank.init()
    x = torch.rand(size // 4) if rank.rank == 0 else torch.empty(size // 4)
    check = bf.broadcast(x, 0, name="values")
    speeds: dict[str, list[float]] = {OURS: [], UCX: [], SOCKETS: []}
    for round_ in range(-1, rounds):
        for name in (OURS, UCX, SOCKETS):
            rank.barrier()
            speed = 0.0
            if name == OURS:
                best = []
                for _ in range(4):
                    rank.barrier()
                    begin = time.perf_counter()
                    y = bf.broadcast_(x, 0, name="bulk")
                    best.append(time.perf_counter() - begin)
                    assert torch.equal(y, check)
                    if rank.rank != 0:
                        y.zero_()
                speed = size / sorted(best[1:])[1]
            elif rank.rank == 0:
                speed = perftest(size) if name == UCX else sockets(size)
            rank.barrier()
            if round_ >= 0:
                speeds[name].append(speed / 1e6)
    bf.shutdown()
    return speeds


def perftest(size: int) -> float:
    if shutil.which("ucx_perftest") is None:
        return float("nan")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    count = max(200, 8 * size // CHUNK)
    command = ["ucx_perftest", "-p", str(port), "-t", "ucp_am_bw", "-s", str(CHUNK)]
    command += ["-n", str(count), "-w", "50", "-O", "4", "-f"]
    environment = {**{k: v for k, v in os.environ.items() if k[:4] != "UCX_"}, **UCX_ENV}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    server = subprocess.Popen(command, env=environment, **pipes)
    try:
        while not listens(port):
            if server.poll() is not None:
                raise RuntimeError(f"ucx_perftest: {server.communicate()[0]}")
            time.sleep(0.01)
        client = subprocess.run([*command, "127.0.0.1"], env=environment, timeout=60, **pipes)
        server.wait(10)
    finally:
        server.kill()
    final = [line for line in client.stdout.splitlines() if re.match(r"^(Final:)?\s*\d+\s", line)]
    if not final:
        raise RuntimeError(f"ucx_perftest says: {client.stdout}")
    # iterations, percentile, average and overall µs, average and overall MB/s (of 2^20), messages
    return float(final[-1].replace("Final:", "").split()[5]) * (1 << 20)


def listens(port: int) -> bool:
    """Whether somebody does, without connecting: that would be the test's client."""
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as lines:
            if any(f":{port:04X} " in line and " 0A " in line for line in lines):
                return True
    return False


def sockets(size: int) -> float:
    """Bytes per second; the best of three, as it is a limit."""
    listener = socket.create_server(("127.0.0.1", 0))
    script = (
        "import socket, sys\ns = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "data = bytearray(int(sys.argv[2]))\n"
        "for _ in range(3):\n  s.recv(1)\n  s.sendall(data)\n"
    )
    address = str(listener.getsockname()[1])
    sender = subprocess.Popen([sys.executable, "-c", script, address, str(size)])
    connection, _ = listener.accept()
    into = memoryview(bytearray(size))
    times = []
    for _ in range(3):
        begin, got = time.perf_counter(), 0
        connection.sendall(b"g")
        while got < size:
            got += connection.recv_into(into[got:])
        times.append(time.perf_counter() - begin)
    sender.wait()
    return size / min(times)


def main() -> None:
    arguments = bench.parser(__doc__)
    arguments.add_argument("--mebibytes", type=int, default=64, help="size of the tensor")
    options = arguments.parse_args()
    bench.build()
    settings: dict[str, Any] = {"size": options.mebibytes << 20, "rounds": options.rounds}
    speeds = bench.launch(body, 2, env={"BLUEFOG_TRANSPORT": "ucx"}, arguments=settings)[0]
    report = bench.Report(f"loopback, {options.mebibytes} MiB one way")
    for name, values in speeds.items():
        report.value(name, values, "MB/s")
    for name, target in ((UCX, 0.85), (SOCKETS, 1.0)):
        ratios = [a / b for a, b in zip(speeds[OURS], speeds[name])]
        report.value(f"bandwidth, {OURS} ÷ {name}", ratios, "", at_least=target)
    report.print(options.json)


if __name__ == "__main__":
    main()
