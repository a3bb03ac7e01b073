"""The lab is what it says: what is measured in it means something."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAB = str(Path(__file__).with_name("lab.py"))

# Sends or receives a number of bytes; prints the seconds from the first to the last byte received.
RECEIVE = """
import socket, sys, time
listener = socket.create_server(("::", 5000), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
connection, _ = listener.accept()
data = connection.recv(1 << 20)
begin, got = time.monotonic(), 0
while data:
    data = connection.recv(1 << 20)
    got += len(data)
print(got / (time.monotonic() - begin), flush=True)
"""
SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5000), 10)
connection.sendall(bytes(int(sys.argv[2])))
"""
# Prints whether a TCP connection can be made to each of the addresses.
REACH = """
import socket, sys
for address in sys.argv[1:]:
    try:
        socket.create_connection((address, 5000), 0.5).close()
        print("yes")
    except ConnectionRefusedError:
        print("yes")
    except OSError:
        print("no")
"""


def python(script, *arguments):
    return [sys.executable, "-c", script, *map(str, arguments)]


def start_receiver(lab, host):
    p = lab.popen(host, python(RECEIVE), stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "ready\n"
    return p


def throughput(lab, address, total):
    """Payload bytes per second from host 0 to host 1."""
    receiver = start_receiver(lab, 1)
    lab.run(0, python(SEND, address, total), check=True)
    return float(receiver.communicate(timeout=20)[0])


def reach(lab, host, *others):
    addresses = [lab.hosts[o].ipv4 for o in others] + [lab.hosts[o].ipv6 for o in others]
    done = lab.run(host, python(REACH, *addresses), capture_output=True, text=True, check=True)
    answers = done.stdout.split()
    assert answers[: len(others)] == answers[len(others) :], "IPv4 and IPv6 differ"
    return answers[: len(others)]


def test_links_have_the_rate(make_lab):
    lab = make_lab(hosts=2, rate="200mbit")
    expected = 200e6 / 8 * 1448 / 1514  # What headers leave of a frame.
    for address in (lab.hosts[1].ipv4, lab.hosts[1].ipv6):
        best = min((throughput(lab, address, 8 << 20) / expected for _ in range(3)),
                   key=lambda ratio: abs(ratio - 1))  # fmt: skip
        assert 0.9 <= best <= 1.1


def test_hosts_differ_and_know_each_other(make_lab):
    lab = make_lab(hosts=3, rate="")
    script = (
        "import os, socket\nprint(socket.gethostname(), os.readlink('/proc/self/ns/net'), "
        "os.getcwd(), socket.gethostbyname('host2'), *sorted(os.listdir('/sys/class/net')))"
    )
    told = [lab.run(h, python(script), capture_output=True, text=True).stdout for h in range(3)]
    names, namespaces, folders, addresses, *devices = zip(*map(str.split, told))
    assert names == ("host0", "host1", "host2")
    assert len({*namespaces, os.readlink("/proc/self/ns/net")}) == 4
    assert set(folders) == {os.getcwd()}
    assert set(addresses) == {lab.hosts[2].ipv4}
    assert [set(d) for d in devices] == [{"eth0"}, {"lo"}]


def test_packets_are_lost(make_lab):
    lab = make_lab(hosts=2, rate="")
    receive = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", 5000))
print("ready", flush=True)
got = 0
while s.recv(100) != b"end":
    got += 1
print(got)
"""
    send = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(int(sys.argv[2])):
    s.sendto(sys.argv[3].encode(), (sys.argv[1], 5000))
"""
    receiver = lab.popen(1, python(receive), stdout=subprocess.PIPE, text=True)
    assert receiver.stdout.readline() == "ready\n"
    reach(lab, 0, 1)  # Their Ethernet addresses are known from here on.
    lab.loss(20)
    for _ in range(10):  # Fewer than the receiver's buffer holds.
        lab.run(0, python(send, lab.hosts[1].ipv4, 100, "x"), check=True)
    lost = lab.lost()
    lab.loss(0)
    lab.run(0, python(send, lab.hosts[1].ipv4, 1, "end"), check=True)
    got = int(receiver.communicate(timeout=10)[0])
    assert 130 <= lost <= 270
    assert 0 <= got - (1000 - lost) <= 10  # Some of what was lost was not ours (ARP).
    with pytest.raises(ValueError, match="0 to 100"):
        lab.loss(101)


def test_links_are_cut_and_healed(make_lab):
    lab = make_lab(hosts=3, rate="")
    assert reach(lab, 0, 1, 2) == ["yes", "yes"]
    lab.cut(1)
    assert reach(lab, 0, 1, 2) == ["no", "yes"]
    assert reach(lab, 2, 0, 1) == ["yes", "no"]
    lab.heal(1)
    assert reach(lab, 0, 1, 2) == ["yes", "yes"]
    lab.cut(0, 2)
    assert reach(lab, 0, 1, 2) == ["yes", "no"]
    assert reach(lab, 1, 0, 2) == ["yes", "yes"]
    lab.heal(0, 2)
    assert reach(lab, 2, 0) == ["yes"]


def test_a_delay_costs_time_and_no_bandwidth(make_lab):
    lab = make_lab(hosts=2, rate="200mbit")
    lab.delay(0.05)
    answer = """
import socket
listener = socket.create_server(("::", 5001), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
connection, _ = listener.accept()
while data := connection.recv(100):
    connection.sendall(data)
"""
    ask = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], 5001), 10)
for turn in range(4):  # The first one waits for the connection, too.
    begin = time.monotonic()
    s.sendall(b"%d" % turn)
    assert s.recv(100) == b"%d" % turn
    if turn: print(time.monotonic() - begin)
"""
    for address in (lab.hosts[1].ipv4, lab.hosts[1].ipv6):
        p = lab.popen(1, python(answer), stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline() == "ready\n"
        times = lab.run(0, python(ask, address), capture_output=True, text=True, check=True).stdout
        p.wait(10)  # The end of the connection arrives as well.
        assert 0.1 <= min(map(float, times.split())) < 0.15
    best = max(throughput(lab, lab.hosts[1].ipv4, 8 << 20) for _ in range(3))
    assert best > 0.9 * 200e6 / 8 * 1448 / 1514


def inhabited(namespaces):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/ns/net") in namespaces:
                found.append(pid)
        except OSError:
            pass
    return found


def test_nothing_is_left_after_sigkill(make_lab):
    make_lab(hosts=1, rate="")  # Skips without the privilege.
    script = f"""
import json, os, subprocess, sys
sys.path.insert(0, {os.path.dirname(LAB)!r})
from lab import Lab
lab = Lab(hosts=3).__enter__()
lab.delay(0.001)
for host in range(3):
    # One that does not die with its parent, either.
    command = ["setsid", "--fork", "sh", "-c", "trap '' HUP TERM; echo there; sleep 1000"]
    assert lab.popen(host, command, stdout=subprocess.PIPE).stdout.readline() == b"there\\n"
pids = [h.pid for h in lab.hosts] + [lab._switch]
spaces = [os.readlink(f"/proc/{{p}}/ns/net") for p in pids]
print(json.dumps([lab._guardian.pid, os.path.dirname(lab.token_file), spaces]), flush=True)
os.read(0, 1)
"""
    links = subprocess.check_output(["ip", "-br", "link"])
    p = subprocess.Popen(python(script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    guardian, folder, namespaces = json.loads(p.stdout.readline())
    assert len(inhabited(namespaces)) >= 10
    assert os.path.exists(folder)
    p.send_signal(signal.SIGKILL)
    p.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{guardian}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert inhabited(namespaces) == []
    assert not os.path.exists(folder)
    assert subprocess.check_output(["ip", "-br", "link"]) == links


def test_the_command_runs_ranks(make_lab):
    make_lab(hosts=1, rate="")
    script = (
        "import os, socket, stat\ne = os.environ\nf = e['BLUEFOG_TOKEN_FILE']\n"
        "print(socket.gethostname(), e['BLUEFOG_RANK'], e['BLUEFOG_SIZE'], e['BLUEFOG_LOCAL_RANK'],"
        " e['BLUEFOG_LOCAL_SIZE'], e['BLUEFOG_COORDINATOR'].split(':')[0],"
        " oct(stat.S_IMODE(os.stat(f).st_mode)))"
    )
    command = [sys.executable, LAB, "--hosts", "2", "--ranks", "2", "--", *python(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [
        f"[{rank}] host{rank // 2} {rank} 4 {rank % 2} 2 10.77.0.1 0o600" for rank in range(4)
    ]


def test_the_first_failure_ends_all(make_lab):
    make_lab(hosts=1, rate="")
    script = (
        "import os, sys, time\nif os.environ['BLUEFOG_RANK'] == '2':\n"
        "  print('enough', end=''); sys.exit(7)\ntime.sleep(1000)"
    )
    command = [sys.executable, LAB, "--hosts", "3", "--", *python(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7
    assert done.stdout == "[2] enough\n"
    assert "rank 2 ended with 7" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the privilege away")
def test_without_the_privilege_it_says_so():
    command = [
        "setpriv",
        "--reuid",
        "65534",
        "--clear-groups",
        "/usr/bin/python3",
        LAB,
        "--",
        "true",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "lab: this machine makes no lab: " in done.stderr
    assert "not permitted" in done.stderr.lower()
