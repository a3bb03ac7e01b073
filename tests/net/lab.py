"""A network in a box: hosts that are network namespaces of this machine, on shaped links.

Every host has its own host name, addresses (IPv4 and IPv6), loopback device and /etc/hosts, and
one link, ``eth0``, into a switch; the switch is a namespace, too, so nothing of the machine's own
network is touched. Files and processes are shared. ::

    with Lab(hosts=2, ranks_per_host=4, rate="1gbit") as lab:
        lab.run(0, ["ping6", "host1"])
        job = lab.start(["python", "train.py"])  # 8 ranks of one bluefog job
        lab.cut(1)                               # host1 is unplugged, packets vanish
        lab.heal(1)

or, from a shell, ``lab.py --hosts 2 --ranks 4 --rate 1gbit -- python train.py``. Needs root (or its
capabilities to administer the system and networks), iproute2, nftables and util-linux. However the
process ends, a guardian takes everything away: see ``guardian.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

HERE = Path(__file__).resolve().parent
TOOLS = ("ip", "tc", "nft", "nsenter", "unshare", "setpriv")
# Connections of the delaying proxy itself.
MARK = 7
PROXY_PORT = 9
UNITS = {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
# Seconds between the request to end and the end by force.
PATIENCE = 5.0


class LabError(RuntimeError):
    """This machine does not let this process make a lab; the text says why."""


@dataclass(frozen=True)
class Host:
    """One host; ``pid`` is a process that lives in its namespaces."""

    name: str
    ipv4: str
    ipv6: str
    pid: int = -1


@dataclass(frozen=True)
class Place:
    """Where a rank of a job runs, and the environment that makes it that rank."""

    rank: int
    host: int
    env: dict[str, str]


class Lab:
    """``hosts`` hosts on links of ``rate`` in each direction. A context manager.

    Parameters
    ----------
    hosts : int
        1 to 200.
    ranks_per_host : int
        For jobs: ``places`` and ``start``. Ranks are numbered host by host.
    rate : str
        As tc writes it, ``"1gbit"`` or ``"200mbit"``; frames are counted with their Ethernet
        headers. Empty: not shaped. Transfers of less than about 4 MiB may escape in a burst
        of 256 KiB.

    Raises
    ------
    LabError
        On entering: without the privilege, the programs or the kernel's features.
    """

    def __init__(self, hosts: int = 2, ranks_per_host: int = 1, rate: str = "1gbit") -> None:
        if not 1 <= hosts <= 200 or ranks_per_host < 1:
            raise ValueError(f"{hosts} hosts × {ranks_per_host} ranks: 1 to 200 hosts, ≥ 1 rank")
        self.rate = _bits_per_second(rate) if rate else 0.0
        self.ranks_per_host = ranks_per_host
        self.size = hosts * ranks_per_host
        self.hosts = [
            Host(f"host{i}", f"10.77.0.{i + 1}", f"fd77::{i + 1:x}") for i in range(hosts)
        ]
        self.token_file = ""
        self._rate = rate
        self._switch = -1
        self._guardian: subprocess.Popen[str] | None = None
        self._proxies: list[subprocess.Popen[str]] = []
        self._next_port = 20_000

    def __enter__(self) -> Lab:
        if missing := [t for t in TOOLS if shutil.which(t) is None]:
            raise LabError(
                f"a lab needs {', '.join(missing)}: install iproute2, nftables and util-linux"
            )
        hosts = [{"name": h.name, "ipv4": h.ipv4, "ipv6": h.ipv6} for h in self.hosts]
        # A session of its own: a Ctrl-C is not for it.
        self._guardian = subprocess.Popen(
            [
                sys.executable,
                str(HERE / "guardian.py"),
                json.dumps({"hosts": hosts, "rate": self._rate}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._guardian.stdout is not None
        answer = json.loads(self._guardian.stdout.readline() or '{"error": "the guardian died"}')
        if "error" in answer:
            self.close()
            raise LabError(f"this machine makes no lab: {answer['error']}")
        self.hosts = [Host(**h, pid=pid) for h, pid in zip(hosts, answer["hosts"])]
        self._switch = answer["switch"]
        self.token_file = answer["token_file"]
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what still runs in the lab, and the lab."""
        if self._guardian is not None:
            assert self._guardian.stdin is not None
            self._guardian.stdin.close()
            self._guardian.wait()
            for p in self._proxies:
                p.wait()
            self._guardian = None

    # ---- Processes.

    def command(self, host: int, command: list[str], cwd: str | None = None) -> list[str]:
        """``command``, to be run in ``host``; the process keeps its id."""
        enter = ["nsenter", "-t", str(self._pid(host)), "-n", "-u", "-m"]
        return [*enter, f"--wdns={cwd or os.getcwd()}", "--", *command]

    def popen(self, host: int, command: list[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` in a host."""
        return subprocess.Popen(self.command(host, command, kwargs.pop("cwd", None)), **kwargs)

    def run(self, host: int, command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run`` in a host."""
        return subprocess.run(self.command(host, command, kwargs.pop("cwd", None)), **kwargs)

    def places(self, ipv6: bool = False, **extra: str) -> list[Place]:
        """A new job over all hosts: what its ranks find in their environment."""
        self._next_port += 2
        first = f"[{self.hosts[0].ipv6}]" if ipv6 else self.hosts[0].ipv4
        common = {k: v for k, v in os.environ.items() if not k.startswith("BLUEFOG_")}
        common.setdefault("OMP_NUM_THREADS", "1")
        common.setdefault("PYTHONUNBUFFERED", "1")
        common.update(
            BLUEFOG_SIZE=str(self.size),
            BLUEFOG_LOCAL_SIZE=str(self.ranks_per_host),
            BLUEFOG_JOB_ID=uuid.uuid4().hex,
            BLUEFOG_COORDINATOR=f"{first}:{self._next_port}",
            BLUEFOG_TOKEN_FILE=self.token_file,
        )
        made = []
        for rank in range(self.size):
            host, local_rank = divmod(rank, self.ranks_per_host)
            own = {"BLUEFOG_RANK": str(rank), "BLUEFOG_LOCAL_RANK": str(local_rank)}
            made.append(Place(rank, host, {**common, **own, **extra}))
        return made

    def start(
        self,
        command: list[str],
        ipv6: bool = False,
        env: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> list[subprocess.Popen[Any]]:
        """Starts ``command`` as the ranks of a job; the processes, by rank."""
        return [
            self.popen(p.host, command, env=p.env, **kwargs)
            for p in self.places(ipv6, **(env or {}))
        ]

    # ---- The network.

    def cut(self, host: int, other: int | None = None) -> None:
        """No packet passes between two hosts, or between ``host`` and all others."""
        self._cut("add", host, other)

    def heal(self, host: int, other: int | None = None) -> None:
        """What ``cut`` with the same arguments did is undone."""
        self._cut("delete", host, other)

    def loss(self, percent: float) -> None:
        """So many of 100 packets are lost on their way through the switch, each by itself.

        Hosts otherwise send up to 64 KiB as one packet. While there is loss, connections that begin
        are cut to the size of frames.
        """
        share = round(percent * 100)
        if not 0 <= share <= 10_000:
            raise ValueError(f"a loss of {percent} percent: 0 to 100")
        for host in range(len(self.hosts)):
            segments = "1" if share else "65535"
            self._in(
                self._pid(host), ["ip", "link", "set", "dev", "eth0", "gso_max_segs", segments]
            )
        rule = f"add rule bridge lab loss numgen random mod 10000 < {share} counter drop"
        self._nft(self._switch, "flush chain bridge lab loss\n" + (rule if share else ""))

    def lost(self) -> int:
        """Packets lost by ``loss`` so far."""
        shown = self._nft(self._switch, "list chain bridge lab loss")
        counted = re.search(r"packets (\d+)", shown)
        return int(counted[1]) if counted else 0

    def delay(self, seconds: float) -> None:
        """TCP connections between hosts that begin from now on take so long one way; once a lab."""
        if self._proxies:
            raise RuntimeError("a lab takes one delay")
        networks = "ip daddr 10.77.0.0/24", "ip6 daddr fd77::/64"
        for host in range(len(self.hosts)):
            arguments = [str(v) for v in (PROXY_PORT, seconds, (self.rate or 1e10) / 8, MARK)]
            proxy = [sys.executable, str(HERE / "delay_proxy.py"), *arguments]
            self._proxies.append(self.popen(host, proxy, stdout=subprocess.PIPE, text=True))
            line = self._proxies[-1].stdout.readline()
            if line != "ready\n":
                raise LabError("the delaying proxy did not start")
            rules = ["table inet lab { chain out { type nat hook output priority -100; }; }"]
            for network in networks:
                rules.append(
                    f"add rule inet lab out oif eth0 meta mark != {MARK} {network} "
                    f"meta l4proto tcp redirect to :{PROXY_PORT}"
                )
            self._nft(self._pid(host), "\n".join(rules))

    def _cut(self, verb: str, host: int, other: int | None) -> None:
        others = [o for o in range(len(self.hosts)) if o != host] if other is None else [other]
        names = [(self.hosts[host].name, self.hosts[o].name) for o in others]
        pairs = ", ".join(f'"{a}" . "{b}", "{b}" . "{a}"' for a, b in names)
        self._nft(self._switch, f"{verb} element bridge lab cut {{ {pairs} }}")

    def _pid(self, host: int) -> int:
        if self._guardian is None:
            raise RuntimeError("the lab is closed, or not entered yet")
        return self.hosts[host].pid

    def _nft(self, pid: int, rules: str) -> str:
        return self._in(pid, ["nft", "-f", "-"], rules)

    @staticmethod
    def _in(pid: int, command: list[str], text: str = "") -> str:
        done = subprocess.run(
            ["nsenter", "-t", str(pid), "-n", *command], input=text, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout


def _bits_per_second(rate: str) -> float:
    parts = re.fullmatch(r"([0-9.]+)([kmg]?bit)", rate)
    if parts is None:
        raise ValueError(f"rate {rate!r}: a number with bit, kbit, mbit or gbit, as in 1gbit")
    return float(parts[1]) * UNITS[parts[2]]


# ---- The command line.


def watch(job: list[subprocess.Popen[bytes]]) -> int:
    """Passes on the output, tagged by rank; the first failure ends all. Its exit code."""
    selector = selectors.DefaultSelector()
    for rank, p in enumerate(job):
        for pipe, out in ((p.stdout, sys.stdout), (p.stderr, sys.stderr)):
            assert pipe is not None
            selector.register(pipe, selectors.EVENT_READ, Tagger(b"[%d] " % rank, out.buffer))
        selector.register(os.pidfd_open(p.pid), selectors.EVENT_READ, rank)
    code = 0
    running = len(job)
    while running > 0:
        for key, _ in selector.select():
            if isinstance(key.data, Tagger):
                if not key.data.forward(key.fd):
                    selector.unregister(key.fileobj)
                continue
            selector.unregister(key.fd)
            os.close(key.fd)
            running -= 1
            ended = job[key.data].wait()
            if ended != 0 and code == 0:
                code = ended if ended > 0 else 128 - ended
                print(f"lab: rank {key.data} ended with {ended}; ending all", file=sys.stderr)
                end(job)
    # What is still in the pipes; a process that the ranks left behind may hold them open.
    while ready := selector.select(timeout=0):
        for key, _ in ready:
            if not key.data.forward(key.fd):
                selector.unregister(key.fileobj)
    return code


class Tagger:
    """Writes the lines of a pipe with something in front; those of a progress bar end in CR."""

    def __init__(self, tag: bytes, out: BinaryIO) -> None:
        self._tag, self._out, self._rest = tag, out, b""

    def forward(self, fd: int) -> bool:
        """What can be read now; false at the end."""
        data = os.read(fd, 1 << 16)
        lines = re.findall(rb"[^\r\n]*(?:\r?\n|\r(?=[^\n]))", self._rest + data)
        self._rest = (self._rest + data)[sum(map(len, lines)) :]
        if not data and self._rest:
            lines.append(self._rest + b"\n")
            self._rest = b""
        self._out.write(b"".join(self._tag + line for line in lines))
        self._out.flush()
        return bool(data)


def end(job: list[subprocess.Popen[Any]]) -> None:
    """SIGTERM, and SIGKILL for those that do not heed it."""
    for p in job:
        p.terminate()
    deadline = time.monotonic() + PATIENCE
    for p in job:
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(max(0.0, deadline - time.monotonic()))
        p.kill()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Runs a command as the ranks of one bluefog job over hosts that are network "
        "namespaces of this machine."
    )
    parser.add_argument("--hosts", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--ranks", type=int, default=1, metavar="K", help="per host (%(default)s)")
    parser.add_argument(
        "--rate", default="1gbit", help="of each link; '': not shaped (%(default)s)"
    )
    parser.add_argument("--loss", type=float, default=0.0, metavar="PERCENT", help="of packets")
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="of TCP, one way")
    parser.add_argument("--ipv6", action="store_true", help="the control plane listens on IPv6")
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with Lab(args.hosts, args.ranks, args.rate) as lab:
            if args.loss:
                lab.loss(args.loss)
            if args.delay:
                lab.delay(args.delay / 1e3)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            own = lab.places()[0].env
            chosen = {
                k: v for k, v in os.environ.items() if k.startswith("BLUEFOG_") and k not in own
            }
            job = lab.start(args.command, args.ipv6, chosen, stdin=subprocess.DEVNULL, **pipes)
            try:
                return watch(job)
            except KeyboardInterrupt:
                end(job)
                return 128 + signal.SIGINT
    except (LabError, ValueError) as e:
        print(f"lab: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
