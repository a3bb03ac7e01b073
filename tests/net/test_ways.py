"""Which way leads to which rank, and over which interface."""

import json
import shutil
import subprocess
from pathlib import Path

BLUEFOG = shutil.which("bluefog") or "bluefog"


def describe(lab, **env):
    """`bluefog info --job` in every rank: what rank 0 prints, and the ends of all."""
    command = [BLUEFOG, "info", "--job", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = lab.start(command, env={"BLUEFOG_LOG_LEVEL": "warn", **env}, **pipes)
    ends = [(*p.communicate(timeout=60), p.returncode) for p in processes]
    return ends[0][0], ends


def two_networks(lab):
    """On each host an interface that leads nowhere, with one address everywhere, as docker makes
    it."""
    for host in range(len(lab.hosts)):
        for command in (
            "ip link add docker0 type bridge",
            "ip address add 172.17.0.1/16 dev docker0",
            "ip link set docker0 up",
        ):
            lab.run(host, command.split(), check=True)


def test_shared_memory_inside_a_host_and_the_network_between_hosts(make_lab):
    lab = make_lab(hosts=2, ranks_per_host=2)
    shown = json.loads(describe(lab)[0])
    assert [r["host"] for r in shown["ranks"]] == ["host0", "host0", "host1", "host1"]
    assert [r["shm"] for r in shown["ranks"]] == [[1], [0], [3], [2]]
    assert [r["ucx"] for r in shown["ranks"]] == [[2, 3], [2, 3], [0, 1], [0, 1]]
    forced = json.loads(describe(lab, BLUEFOG_TRANSPORT="ucx")[0])
    assert [r["ucx"] for r in forced["ranks"]] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_the_interface_is_the_one_that_leads_to_the_coordinator(make_lab):
    lab = make_lab(hosts=2, ranks_per_host=1)
    two_networks(lab)
    for wanted in ("", "eth0", "10.77.0.0/16", "fd77::/64"):
        shown = json.loads(describe(lab, BLUEFOG_NETWORK_INTERFACE=wanted)[0])
        assert [r["network"] for r in shown["ranks"]] == [
            "eth0 10.77.0.1 fd77::1",
            "eth0 10.77.0.2 fd77::2",
        ]


def test_a_job_works_beside_an_interface_that_leads_nowhere(make_lab):
    lab = make_lab(hosts=2, ranks_per_host=1)
    two_networks(lab)
    script = (
        "import numpy as np, bluefog as bf; bf.init(); "
        "assert np.all(bf.allreduce(np.full(300_000, float(bf.rank()))) == 0.5)"
    )
    for wanted in ("", "eth0", "eth0,docker0"):
        env = {"BLUEFOG_NETWORK_INTERFACE": wanted}
        processes = lab.start([shutil.which("python") or "python", "-c", script], env=env)
        assert [p.wait(timeout=60) for p in processes] == [0, 0], wanted


def test_an_interface_that_does_not_exist_is_named_with_those_that_do(make_lab):
    lab = make_lab(hosts=2, ranks_per_host=1)
    for wanted in ("ib7", "192.168.0.0/16", "eth0,ib7"):
        for _, errors, code in describe(lab, BLUEFOG_NETWORK_INTERFACE=wanted)[1]:
            assert code == 1
            assert wanted.rsplit(",", 1)[-1] in errors
            assert "BLUEFOG_NETWORK_INTERFACE" in errors
            assert "eth0 10.77.0." in errors


def test_without_ucx_a_job_over_two_hosts_says_what_to_install(make_lab, tmp_path):
    lab = make_lab(hosts=2, ranks_per_host=1)
    lines = subprocess.run([BLUEFOG, "info", "--json"], stdout=subprocess.PIPE, check=True).stdout
    paths = {c["name"]: c["path"] for c in json.loads(lines)["components"]}
    control = Path(paths["control"])
    (tmp_path / control.name).symlink_to(control)
    for _, errors, code in describe(lab, BLUEFOG_COMPONENT_DIR=str(tmp_path))[1]:
        assert code == 1
        assert "apt-get install libucx-dev" in errors
        assert "host0" in errors
        assert "host1" in errors
    # On one host nothing is missing.
    alone = make_lab(hosts=1, ranks_per_host=2)
    shown = json.loads(describe(alone, BLUEFOG_COMPONENT_DIR=str(tmp_path))[0])
    assert [r["shm"] for r in shown["ranks"]] == [[1], [0]]
