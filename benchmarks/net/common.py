"""What the benchmarks of networks share: limits, plain sockets, gloo, what this bluefog can do."""

from __future__ import annotations

import inspect
import os
import socket
import threading
from typing import Any

import bench

SOCKET_PORT = 21_000
RATE, BITS_PER_SECOND = "1gbit", 1e9


def wire_us(payload: float, bits_per_second: float = BITS_PER_SECOND) -> float:
    """Microseconds in which a link carries ``payload`` bytes and nothing else.

    Headers of TCP, IP and Ethernet, which the links of the lab count as well, take 4.6 percent
    more (1514 bytes carry 1448), so 1.046 is what no TCP can beat.
    """
    return payload * 8 / bits_per_second * 1e6


class Wire:
    """TCP sockets from this rank to those ``offsets`` further, without any library."""

    def __init__(self, rank: bench.Rank, addresses: list[str], offsets: list[int]) -> None:
        n = rank.size
        listener = socket.create_server(("0.0.0.0", SOCKET_PORT + rank.rank), backlog=n)
        rank.barrier()
        self._out = []
        for offset in offsets:
            peer = (rank.rank + offset) % n
            s = socket.create_connection((addresses[peer], SOCKET_PORT + peer), 30)
            s.sendall(bytes([rank.rank]))
            self._out.append(s)
        accepted = {}
        while len(accepted) < len({(rank.rank - o) % n for o in offsets}):
            s, _ = listener.accept()
            accepted[s.recv(1)[0]] = s
        self._in = [accepted[(rank.rank - o) % n] for o in offsets]
        listener.close()

    def exchange(self, which: int, data: memoryview, into: memoryview) -> None:
        """Sends ``data`` by one offset and receives as much, at the same time."""
        sender = threading.Thread(target=self._out[which].sendall, args=(data,))
        sender.start()
        got = 0
        while got < len(into):
            got += self._in[which].recv_into(into[got:])
        sender.join()


def bytes_of(tensor: Any) -> memoryview:
    """A CPU tensor's memory."""
    return memoryview(tensor.numpy()).cast("B")


def gloo(rank: bench.Rank) -> Any:
    """torch.distributed over the lab's links."""
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group(
        "gloo", init_method=f"file://{rank.folder}/gloo", rank=rank.rank, world_size=rank.size
    )
    return dist


def takes(function: Any, parameter: str, value: str = "") -> bool:
    """Whether this version of bluefog knows a parameter, and a value that its type names."""
    found = inspect.signature(function).parameters.get(parameter)
    return found is not None and value in str(found.annotation)


def addresses(lab: bench.Lab) -> list[str]:
    """IPv4 addresses by rank."""
    return [lab.hosts[r // lab.ranks_per_host].ipv4 for r in range(lab.size)]
