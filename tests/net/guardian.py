"""The process that makes the hosts of a lab and takes them away again.

``lab.py`` starts it with its plan as the one argument and keeps the writing end of its standard
input. When that is closed, or the process of the lab is gone in whatever way, the guardian ends
every process that lives in one of the lab's network namespaces. The namespaces have no names: they,
their links and their mounts vanish with the last process. Answers once on standard output, in JSON:
``{"hosts": [pid, ...], "switch": pid, "token_file": path}`` or ``{"error": text}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A process that does nothing but live in new namespaces, and dies with the guardian.
HOLD = ["setpriv", "--pdeathsig", "KILL"]
HOLD += ["unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-ec"]
# /sys/class/net shows the devices of the namespace that mounted it.
SETUP = 'hostname "$1"; mount -t sysfs sysfs /sys; mount --bind "$2" /etc/hosts; '
READY = "ip link set lo up; echo ready; exec sleep infinity"
# Above this size a packet is cut up before the shaper sees it, so it must not be small; larger
# bursts let transfers escape it.
BURST = "256kb"
QUEUE = "50ms"


def run(command: list[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


def hold(name: str, hosts_file: str) -> subprocess.Popen[str]:
    setup = SETUP if hosts_file else ""
    return subprocess.Popen(
        [*HOLD, setup + READY, "hold", name, hosts_file],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_ready(holder: subprocess.Popen[str]) -> int:
    assert holder.stdout is not None and holder.stderr is not None
    if holder.stdout.readline() != "ready\n":
        raise RuntimeError(holder.stderr.read().strip() or "no process in new namespaces")
    return holder.pid


def connect(plan: dict[str, Any], hosts: list[int], switch: int) -> None:
    """A link from each host to a bridge, shaped on both ends."""
    ports = ["link add name br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0"]
    ports += ["link set dev br0 up"]
    for host, pid in zip(plan["hosts"], hosts):
        ports.append(f"link add name {host['name']} type veth peer name eth0 netns {pid}")
        ports.append(f"link set dev {host['name']} master br0 up")
    run(["nsenter", "-t", str(switch), "-n", "ip", "-batch", "-"], "\n".join(ports))
    shape = f"root tbf rate {plan['rate']} burst {BURST} latency {QUEUE}\n"
    for host, pid in zip(plan["hosts"], hosts):
        # Without `nodad` an IPv6 address could be used only after a second.
        own = [f"addr add {host['ipv4']}/24 dev eth0", f"addr add {host['ipv6']}/64 dev eth0 nodad"]
        own += ["link set dev eth0 up"]
        run(["nsenter", "-t", str(pid), "-n", "ip", "-batch", "-"], "\n".join(own))
        if plan["rate"]:
            shaper = f"qdisc replace dev eth0 {shape}"
            run(["nsenter", "-t", str(pid), "-n", "tc", "-batch", "-"], shaper)
    if plan["rate"]:
        shapers = "".join(f"qdisc replace dev {h['name']} {shape}" for h in plan["hosts"])
        run(["nsenter", "-t", str(switch), "-n", "tc", "-batch", "-"], shapers)
    rules = """
        table bridge lab {
          set cut { type ifname . ifname; }
          chain loss { }
          chain forward {
            type filter hook forward priority 0;
            iifname . oifname @cut drop
            jump loss
          }
        }"""
    run(["nsenter", "-t", str(switch), "-n", "nft", "-f", "-"], rules)


def name_lines(plan: dict[str, Any]) -> list[str]:
    """/etc/hosts of every host."""
    lines = ["127.0.0.1 localhost\n", "::1 localhost\n"]
    return lines + [f"{h[a]} {h['name']}\n" for a in ("ipv4", "ipv6") for h in plan["hosts"]]


def inhabitants(namespaces: set[str]) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            # Gone meanwhile: good.
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/net") in namespaces:
                    found.append(int(entry))
    return found


def clean_up(namespaces: set[str]) -> None:
    """What forks while it is looked for is found the next time."""
    namespaces = namespaces - {os.readlink("/proc/self/ns/net")}
    while left := inhabitants(namespaces):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0] > 0:
                pass


def main() -> None:
    plan = json.loads(sys.argv[1])
    parent = os.pidfd_open(os.getppid())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    namespaces: set[str] = set()
    folder = Path(tempfile.mkdtemp(prefix="bluefog-lab-"))  # Mode 0700.
    try:
        hosts_file, token_file = folder / "hosts", folder / "token"
        hosts_file.write_text("".join(name_lines(plan)))
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32) + "\n")
        holders = [hold(h["name"], str(hosts_file)) for h in plan["hosts"]] + [hold("switch", "")]
        # The ends of the links must exist before they are known: of a failed one the rest must go.
        try:
            *hosts, switch = [wait_until_ready(h) for h in holders]
        finally:
            for h in holders:
                with contextlib.suppress(OSError):
                    namespaces.add(os.readlink(f"/proc/{h.pid}/ns/net"))
        connect(plan, hosts, switch)
        answer = {"hosts": hosts, "switch": switch, "token_file": str(token_file)}
        print(json.dumps(answer), flush=True)
        select.select([0, parent], [], [])
    except (RuntimeError, OSError) as e:
        print(json.dumps({"error": str(e)}), flush=True)
    finally:
        clean_up(namespaces)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
