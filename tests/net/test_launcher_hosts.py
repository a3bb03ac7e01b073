"""``bluefog run`` over ssh, against a real sshd: once with two names of this machine as two hosts,
and on hosts of a network lab."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import ClassVar

import pytest
from sshd import MISSING, Sshd, marked

BESIDE = Path(sys.executable).with_name("bluefog")
TOOL = os.environ.get("BLUEFOG_TOOL") or (BESIDE if BESIDE.exists() else shutil.which("bluefog"))
pytestmark = [
    pytest.mark.skipif(TOOL is None, reason="the bluefog command is not installed"),
    pytest.mark.skipif(MISSING != "", reason=MISSING),
]
TOOL = str(TOOL)
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("BLUEFOG_", "OMP_"))}
VERSION = (Path(__file__).parents[2] / "VERSION").read_text().strip()
SLEEP = "sleep 1000 & echo pid $!; echo pid $$; wait"


class Site:
    """Where jobs are started, and the hosts' sshds."""

    def __init__(self, sshds, hosts, options, command=lambda words, cwd: words):
        self.sshds, self.hosts, self.options, self.command = sshds, hosts, options, command

    def words(self, *args, hosts=None, cwd=None):
        words = [TOOL, "run", *self.options, "-H", hosts or self.hosts, *map(str, args)]
        return self.command(words, cwd)

    def run(self, *args, hosts=None, env=None, cwd=None) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.words(*args, hosts=hosts, cwd=cwd),
            env={**ENVIRONMENT, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )

    def start(self, *args, hosts=None) -> Job:
        return Job(self, args, hosts)

    def sessions(self):
        return [pid for sshd in self.sshds for pid in sshd.sessions()]

    def close(self):
        for sshd in self.sshds:
            sshd.close()


class Job:
    """A running job; every process of it, on all hosts, has its mark in the environment."""

    running: ClassVar[list[Job]] = []

    def __init__(self, site, args, hosts):
        self.site, self.mark = site, uuid.uuid4().hex
        self.process = subprocess.Popen(
            site.words("--env", f"JOB_MARK={self.mark}", *args, hosts=hosts),
            env=ENVIRONMENT,
            # Under nohup SIGHUP is ignored, and the launcher would leave it so.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        Job.running.append(self)

    def lines(self, n):
        return [self.process.stdout.readline() for _ in range(n)]

    def end(self):
        """Exit code, output, errors."""
        out, errors = self.process.communicate(timeout=100)
        return self.process.returncode, out, errors

    def left(self, seconds=1.0):
        """Processes of the job, its agents among them, that outlive this time."""
        deadline = time.monotonic() + seconds
        while pids := marked(self.mark) + self.site.sessions():
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pids[0])
                ended, _, _ = select.select([pidfd], [], [], max(0, deadline - time.monotonic()))
                os.close(pidfd)
                if not ended:
                    return [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
        return []


@pytest.fixture(autouse=True)
def _no_job_outlives_a_failed_test():
    yield
    while Job.running:
        process = Job.running.pop().process
        process.kill()
        process.communicate()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two hosts that are this machine by two names; no privilege is needed."""
    folder = tmp_path_factory.mktemp("sshd")
    sshd = Sshd(folder, "127.0.0.1", free_port(), ["127.0.0.1", "localhost"])
    site = Site([sshd], "127.0.0.1:2,localhost:2", [*sshd.options(), "--ssh-always"])
    yield site
    site.close()


@pytest.fixture
def make_site(make_lab, tmp_path):
    """Hosts of a lab; the launcher is on the first."""
    made = []

    def make(hosts=2, slots=2, path="/usr/bin:/bin"):
        lab = make_lab(hosts=hosts)
        names = [host.name for host in lab.hosts]
        sshds = [
            Sshd(tmp_path, "0.0.0.0", 22, names, lambda c, i=i: lab.command(i, c), path)
            for i in range(1, hosts)
        ]
        listed = ",".join(f"{name}:{slots}" for name in names)
        site = Site(sshds, listed, sshds[0].options(), lambda c, cwd: lab.command(0, c, cwd))
        site.lab = lab
        made.append(site)
        return site

    yield make
    for site in made:
        site.close()


def by_tag(text):
    return dict(line.split(" ", 1) for line in text.splitlines())


# ---- Two names of this machine.


def test_every_rank_knows_its_place(here):
    names = "RANK SIZE LOCAL_RANK LOCAL_SIZE JOB_ID COORDINATOR TOKEN_FILE"
    show = " ".join(f"$BLUEFOG_{name}" for name in names.split())
    result = here.run("sh", "-c", f"echo {show}; stat -Lc %a:%s $BLUEFOG_TOKEN_FILE | tail -n 1")
    assert result.returncode == 0, result.stderr
    values = [line.split() for line in result.stdout.splitlines() if ":32" not in line]
    assert sorted(v[:5] for v in values) == [
        [f"[{r}]", str(r), "4", str(r % 2), "2"] for r in range(4)
    ]
    assert len({(v[5], v[6]) for v in values}) == 1
    assert values[0][6].startswith("127.0.0.1:")
    # The token: for the owner only, 32 bytes, one file a host.
    assert result.stdout.count("600:32") == 4
    assert len({v[7] for v in values}) == 2


def test_ranks_of_two_hosts_average(here):
    script = (
        "import numpy as np, bluefog as bf; bf.init(); r = bf.rank();"
        "print(bf.allreduce(np.full(3, float(r)))[0])"
    )
    result = here.run(sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [f"[{r}] 1.5" for r in range(4)]


def test_environment_goes_by_choice(here):
    script = "echo $A,$B,$C,$BLUEFOG_BUCKET_BYTES,$OMP_NUM_THREADS,$BLUEFOG_NETWORK_INTERFACE"
    env = {"A": "a b", "B": "x", "C": "no", "BLUEFOG_BUCKET_BYTES": "1M", "OMP_NUM_THREADS": "3"}
    args = ("--forward-env", "A,B", "--env", "B=é='y'", "--network-interface", "eth7")
    result = here.run("-np", 3, *args, "sh", "-c", script, env=env)
    assert set(by_tag(result.stdout).values()) == {"a b,é='y',,1M,3,eth7"}
    result = here.run("--forward-env", "NOT_THERE", "true")
    assert result.returncode == 2
    assert "NOT_THERE, which is not set here" in result.stderr


def test_folder_output_and_standard_input(here, tmp_path):
    script = "pwd; echo error >&2; printf '%s' rest; cat"
    result = here.run("-v", "sh", "-c", script, cwd=tmp_path)
    tags = [f"[{r}@{'127.0.0.1' if r < 2 else 'localhost'}]" for r in range(4)]
    wanted = [f"{tag} {text}" for tag in tags for text in (str(tmp_path), "rest")]
    assert sorted(result.stdout.splitlines()) == sorted(wanted)
    errors = result.stderr.splitlines()
    assert sorted(line for line in errors if line.startswith("[")) == [f"{t} error" for t in tags]
    assert any("4 ranks on 2 hosts" in line for line in errors)
    assert here.run("--cwd", "/", "--no-tag", "pwd").stdout == "/\n" * 4
    result = here.run("--cwd", tmp_path / "not there", "pwd")
    assert (result.returncode, result.stdout) == (126, "")
    assert re.search(r"cannot start rank [02] on \S+, the folder /\S+", result.stderr)
    assert "No such file or directory; --cwd names another" in result.stderr


def test_what_ranks_print_is_only_output(here):
    # What the agent itself would say, and bytes that are no text.
    lie = r"printf '\036bluefog-agent 1 1\n\000\000\000\000\012\000\000\000\000\377\n'; exit 0"
    words = here.words("sh", "-c", lie)
    result = subprocess.run(words, env=ENVIRONMENT, capture_output=True, timeout=60)
    assert result.returncode == 0
    assert result.stdout.count(b"\x1ebluefog-agent 1 1\n") == 4
    assert result.stdout.count(b"] \0\0\0\0\xff\n") == 4


def test_much_output_for_a_slow_reader(here):
    job = here.start("sh", "-c", "seq 60000; echo end >&2")
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.process.wait(timeout=0.5)
    code, out, errors = job.end()
    assert (code, errors.count("end")) == (0, 4)
    for rank in range(4):
        mine = [line[4:] for line in out.splitlines() if line.startswith(f"[{rank}] ")]
        assert mine == [str(i + 1) for i in range(60000)]


def test_first_failure_ends_all(here):
    script = f"[ $BLUEFOG_RANK = 3 ] && read line < $FIFO && exit 7; {SLEEP}"
    fifo = here.sshds[0].folder / uuid.uuid4().hex
    os.mkfifo(fifo)
    job = here.start("--env", f"FIFO={fifo}", "sh", "-c", script)
    job.lines(6)
    fifo.write_text("go\n")
    code, _, errors = job.end()
    assert code == 7
    assert "rank 3 on localhost failed with exit code 7" in errors
    assert "SIGTERM to the ranks that still run: 0, 1, 2" in errors
    assert job.left() == []


def test_killed_rank_is_the_cause_and_not_those_that_miss_it(here):
    script = (
        "import os, signal, numpy as np, bluefog as bf; bf.init(); r = bf.rank();"
        "bf.allreduce(np.ones(3)); r == 2 and os.kill(os.getpid(), signal.SIGKILL);"
        "bf.allreduce(np.ones(3))"
    )
    result = here.run(sys.executable, "-c", script)
    assert result.returncode == 128 + signal.SIGKILL
    assert "rank 2 on localhost was killed by SIGKILL" in result.stderr
    assert "SIGTERM" not in result.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_reach_all_hosts_and_leave_nothing(here, number, code):
    job = here.start("sh", "-c", f"trap 'echo got INT; exit 1' INT; {SLEEP}")
    job.lines(8)
    job.process.send_signal(number)
    ended, out, errors = job.end()
    assert ended == code
    assert sorted(out.splitlines()) == [f"[{r}] got INT" for r in range(4)]
    assert "failed with exit code" not in errors
    assert job.left() == []


def test_a_killed_launcher_leaves_nothing(here):
    job = here.start("sh", "-c", f"trap 'echo deaf' TERM; {SLEEP}; sleep 1000")
    job.lines(8)
    job.process.kill()
    job.end()
    assert job.left(10) == []


def test_a_killed_agent_is_a_lost_host(here):
    job = here.start("sh", "-c", SLEEP)
    job.lines(8)
    agents = [
        pid
        for pid in here.sessions()
        if b"run-agent" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]
    assert len(agents) == 2
    os.kill(max(agents), signal.SIGKILL)
    code, _, errors = job.end()
    assert code == 255
    assert re.search(r"the connection to \S+ was lost \(ssh ended with exit code 255\)", errors)
    # What its ranks had started themselves had nobody left to end it.
    for pid in marked(job.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_hosts_that_cannot_be_reached(here):
    result = here.run("true", hosts="127.0.0.1,no-such-host.invalid")
    assert (result.returncode, result.stdout) == (255, "")
    assert "[no-such-host.invalid] ssh: Could not resolve hostname" in result.stderr
    assert "cannot log in to no-such-host.invalid by ssh: is the name right?" in result.stderr
    # The first given port wins.
    result = here.run("--ssh-option", f"Port={free_port()}", "true")
    closed = [TOOL, "run", "--ssh-always", "-H", "127.0.0.1", "-p", str(free_port()), "true"]
    result = subprocess.run(closed, capture_output=True, text=True, timeout=60)
    assert result.returncode == 255
    assert "Connection refused" in result.stderr
    assert "does sshd run there, and at this port (-p)?" in result.stderr


def test_ssh_that_would_ask_fails(here):
    # Neither a password nor an unknown host key is asked for.
    port = ["-p", str(here.sshds[0].port), "--ssh-always", "-H", "127.0.0.1"]
    known = ["--ssh-option", f"UserKnownHostsFile={here.sshds[0].folder}/known_hosts"]
    no_key = ["--ssh-option", "IdentityFile=/dev/null", "--ssh-option", "IdentitiesOnly=yes"]
    for options, said, advice in (
        (known + no_key, "Permission denied", "ssh-copy-id 127.0.0.1"),
        (
            ["--ssh-option", "UserKnownHostsFile=/dev/null"],
            "Host key verification failed",
            "log in once by hand",
        ),
    ):
        words = [TOOL, "run", *port, *options, "true"]
        result = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 255
        assert said in result.stderr
        assert advice in result.stderr


def test_another_bluefog_or_none(here, tmp_path):
    result = here.run("--remote-bluefog", "/no/bluefog", "true")
    assert result.returncode == 255
    assert "has no /no/bluefog: install the same bluefog there" in result.stderr
    assert "--remote-bluefog" in result.stderr
    other = tmp_path / "bluefog"
    other.write_text("#!/bin/sh\nprintf 'Welcome\\n\\036bluefog-agent 0.0.1 1\\n'\ncat\n")
    other.chmod(0o755)
    result = here.run("--remote-bluefog", other, "true")
    assert result.returncode == 255
    assert "] Welcome\n" in result.stderr
    versions = rf"{other} on \S+ is version 0\.0\.1 1 and this is version {re.escape(VERSION)} "
    assert re.search(versions, result.stderr)
    other.write_text("#!/bin/sh\necho no such command >&2; exit 2\n")
    result = here.run("--remote-bluefog", other, "true")
    assert result.returncode == 255
    assert "ended with exit code 2 and did not answer as bluefog" in result.stderr
    other.write_text("#!/bin/sh\nexec cat > /dev/null\n")
    result = here.run("--remote-bluefog", other, "--start-timeout", 1, "true")
    assert result.returncode == 255
    assert "was not ready within 1 s (--start-timeout)" in result.stderr


def test_a_command_that_is_not_there(here, tmp_path):
    result = here.run("no-such-command")
    assert (result.returncode, result.stdout) == (127, "")
    assert re.search(r"rank [02] on \S+, 'no-such-command': command not found", result.stderr)
    # What is found here runs there, too, though it is in no PATH there.
    (tmp_path / "tool").write_text("#!/bin/sh\necho $0\n")
    (tmp_path / "tool").chmod(0o755)
    result = here.run("tool", env={"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"})
    assert set(by_tag(result.stdout).values()) == {f"{tmp_path}/tool"}
    # A PATH for the ranks counts alone.
    result = here.run("--env", "PATH=/nowhere", "tool", env={"PATH": f"{tmp_path}:/usr/bin"})
    assert result.returncode == 127


def jobs_in_a_row(site, count):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(count):
        job = site.start("sh", "-c", "echo $BLUEFOG_RANK")
        assert job.end()[0] == 0
        assert job.left() == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_jobs_in_a_row_leave_nothing(here):
    jobs_in_a_row(here, 5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_hundred_jobs_in_a_row_leave_nothing(here):
    jobs_in_a_row(here, 100)


# ---- Hosts of a lab.


def test_jobs_over_hosts(make_site):
    site = make_site(hosts=3)
    result = site.run("sh", "-c", "echo $(hostname) $BLUEFOG_COORDINATOR")
    assert result.returncode == 0, result.stderr
    said = {tag: text.split() for tag, text in by_tag(result.stdout).items()}
    assert [said[f"[{r}]"][0] for r in range(6)] == [f"host{r // 2}" for r in range(6)]
    assert {text[1].split(":")[0] for text in said.values()} == {"host0"}
    script = (
        "import numpy as np, bluefog as bf; bf.init();"
        "print(bf.allreduce(np.full(3, float(bf.rank())))[0])"
    )
    # Rank 0 on this host under a name that only this host knows it by, and on another one.
    for hosts in ("localhost:1,host1:2,host2:1", "host2:2,host1:1,localhost:1"):
        result = site.run(sys.executable, "-c", script, hosts=hosts)
        assert result.returncode == 0, result.stderr
        assert set(by_tag(result.stdout).values()) == {"1.5"}


def test_another_program_by_the_same_name_is_named(make_site, tmp_path):
    # As with the Python of a virtual environment that is on one host only.
    for folder, code in (("here", 0), ("there", 1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "python-x").write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / folder / "python-x").chmod(0o755)
    site = make_site(slots=1, path=f"{tmp_path}/there:/usr/bin:/bin")
    path = {"PATH": f"here:{ENVIRONMENT['PATH']}"}
    result = site.run("python-x", env=path, cwd=tmp_path)
    assert result.returncode == 1
    assert "rank 1 on host1 failed with exit code 1" in result.stderr
    programs = f"here/python-x on host0, {tmp_path}/there/python-x on host1"
    assert f"'python-x' is {programs}" in result.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_on_either_host(make_site, how):
    site = make_site()
    job = site.start("sh", "-c", f"trap '' INT; {SLEEP}; wait; sleep 1000")
    job.lines(8)
    job.process.send_signal(how)
    job.end()
    assert job.left(10) == []


def test_a_host_that_dies_ends_the_others(make_site):
    site = make_site()
    job = site.start("sh", "-c", SLEEP)
    job.lines(8)
    for pid in site.sessions():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    code, _, errors = job.end()
    assert code == 255
    assert "the connection to host1 was lost" in errors
    assert "2 ranks from rank 2 on" in errors
    assert job.left() == []


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="calls the kernel by number")
def test_a_death_is_told_though_its_sockets_stay_open(make_site):
    # Not os.fork(), behind which bluefog closes the child's copies.
    script = """if True:
        import ctypes, os, signal, time, numpy as np, bluefog as bf
        bf.init()
        bf.allreduce(np.ones(3))
        if bf.rank() == 1:
            libc = ctypes.CDLL(None)
            if libc.syscall(57) == 0:
                libc.pause()
            print(time.monotonic(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            bf.allreduce(np.ones(3))
        except bf.BluefogError as error:
            print(time.monotonic(), error)
        """
    site = make_site(slots=1)
    result = site.run("--env", "BLUEFOG_DEAD_MS=20000", sys.executable, "-c", script)
    assert result.returncode == 128 + signal.SIGKILL, result.stderr
    said = by_tag(result.stdout)
    heard, text = said["[0]"].split(" ", 1)
    assert "rank 1 died: killed by SIGKILL on host1" in text
    assert float(heard) - float(said["[1]"]) < 2  # 0.1 s where a core is free.


def test_a_cut_network_leaves_nothing_on_either_side(make_site):
    site = make_site()
    job = site.start("--lost-after", 5, "sh", "-c", SLEEP)
    job.lines(8)
    site.lab.cut(1)
    code, _, errors = job.end()
    assert code == 255
    assert "the connection to host1 was lost" in errors
    assert marked(job.mark) == [] or job.left(20) == []
