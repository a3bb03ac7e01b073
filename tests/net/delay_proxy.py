"""Delays all TCP between hosts of a lab: relays each connection in user space.

``lab.py`` starts one in each host and has the kernel redirect to it what processes there connect
to. Keeps the order of bytes; holds at most what the link carries in twice the delay, so that the
sender feels the network's back-pressure. A connection is accepted before the real one is there, so
where nobody listens it is closed instead of refused.

    delay_proxy.py PORT SECONDS BYTES_PER_SECOND MARK
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections import deque
from collections.abc import Coroutine
from typing import Any

SO_ORIGINAL_DST = 80  # Of IPPROTO_IP and, for IPv6, of IPPROTO_IPV6.
PIECE = 256 << 10


def original_destination(connection: socket.socket) -> tuple[str, int]:
    """Where the connection was to go before it was redirected."""
    peer = connection.getpeername()[0]
    if ":" in peer and not peer.startswith("::ffff:"):
        raw = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
        return socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack("!H", raw[2:4])[0]
    raw = connection.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
    return socket.inet_ntop(socket.AF_INET, raw[4:8]), struct.unpack("!H", raw[2:4])[0]


async def together(*parts: Coroutine[Any, Any, None]) -> None:
    """All of them; when one fails the rest is cancelled."""
    tasks = [asyncio.ensure_future(p) for p in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for t in tasks:
            t.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Proxy:
    def __init__(self, delay: float, rate: float, mark: int) -> None:
        self.delay, self.mark = delay, mark
        self.capacity = max(PIECE, int(2 * rate * delay))

    async def serve(self, port: int) -> None:
        listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        listener.setblocking(False)
        print("ready", flush=True)
        loop = asyncio.get_running_loop()
        tasks = set()
        while True:
            connection, _ = await loop.sock_accept(listener)
            task = loop.create_task(self.relay(connection))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def relay(self, near: socket.socket) -> None:
        far = None
        try:
            host, port = original_destination(near)
            far = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self.mark)
            for s in (near, far):
                s.setblocking(False)
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(far, (host, port))
            there, back = Direction(near, far, self), Direction(far, near, self)
            await together(there.fill(), there.drain(), back.fill(), back.drain())
        except OSError:
            pass  # Both ends are closed: each sees that the connection broke.
        finally:
            for s in (near, far):
                if s is not None:
                    s.close()


class Direction:
    """One direction of a connection, until its end."""

    def __init__(self, source: socket.socket, sink: socket.socket, proxy: Proxy) -> None:
        self.source, self.sink = source, sink
        self.delay, self.capacity = proxy.delay, proxy.capacity
        self.held: deque[tuple[float, bytes]] = deque()
        self.size = 0
        self.changed = asyncio.Condition()

    async def fill(self) -> None:
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:
            async with self.changed:
                await self.changed.wait_for(lambda: self.size < self.capacity)
            data = await loop.sock_recv(self.source, PIECE)
            async with self.changed:
                self.held.append((loop.time() + self.delay, data))
                self.size += len(data)
                self.changed.notify_all()

    async def drain(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: self.held)
                due, data = self.held.popleft()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                with contextlib.suppress(OSError):
                    self.sink.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(self.sink, data)
            async with self.changed:
                self.size -= len(data)
                self.changed.notify_all()


if __name__ == "__main__":
    port, delay, rate, mark = sys.argv[1:]
    asyncio.run(Proxy(float(delay), float(rate), int(mark)).serve(int(port)))
