"""``bluefog run`` with shell commands as ranks: variables, output, failures, signals."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

BESIDE = Path(sys.executable).with_name("bluefog")
TOOL = os.environ.get("BLUEFOG_TOOL") or (BESIDE if BESIDE.exists() else shutil.which("bluefog"))
pytestmark = pytest.mark.skipif(TOOL is None, reason="the bluefog command is not installed")

ENVIRONMENT = {
    k: v
    for k, v in os.environ.items()
    if not k.startswith("BLUEFOG_") and k not in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")
}


def run(*args, env: dict | None = None, stdin: bytes = b"") -> subprocess.CompletedProcess:
    result = subprocess.run(
        [TOOL, "run", *map(str, args)],
        env={**ENVIRONMENT, **(env or {})},
        input=stdin,
        capture_output=True,
        timeout=60,
    )
    # Not text=True, which would turn carriage returns into newlines.
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    return result


def start(*args, ignore: tuple[int, ...] = ()) -> subprocess.Popen:
    def ignore_signals() -> None:
        for number in ignore:
            signal.signal(number, signal.SIG_IGN)

    return subprocess.Popen(
        [TOOL, "run", *map(str, args)],
        env=ENVIRONMENT,
        preexec_fn=ignore_signals,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_pids(job: subprocess.Popen, n: int) -> list[int]:
    """``n`` lines that end in "pid N"; returns pidfds, by which the processes' end is awaited."""
    lines = [job.stdout.readline() for _ in range(n)]
    return [os.pidfd_open(int(line.split("pid ")[1])) for line in lines]


def has_ended(pidfds: list[int], seconds: float = 10) -> bool:
    try:
        return all(select.select([fd], [], [], seconds)[0] for fd in pidfds)
    finally:
        for fd in pidfds:
            os.close(fd)


def test_variables_of_every_rank():
    names = "BLUEFOG_RANK BLUEFOG_SIZE BLUEFOG_LOCAL_RANK BLUEFOG_LOCAL_SIZE BLUEFOG_COORDINATOR"
    names += " BLUEFOG_JOB_ID OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMP_NUM_THREADS"
    script = "echo " + " ".join("$" + name for name in names.split())
    lines = {}
    for line in run("-np", 3, "sh", "-c", script).stdout.splitlines():
        tag, *values = line.split()
        lines[tag] = dict(zip(names.split(), values))
    assert sorted(lines) == ["[0]", "[1]", "[2]"]
    for r in range(3):
        v = lines[f"[{r}]"]
        assert v["BLUEFOG_RANK"] == v["BLUEFOG_LOCAL_RANK"] == v["OMPI_COMM_WORLD_RANK"] == str(r)
        assert v["BLUEFOG_SIZE"] == v["BLUEFOG_LOCAL_SIZE"] == v["OMPI_COMM_WORLD_SIZE"] == "3"
        assert v["OMP_NUM_THREADS"] == "1"
        assert v["BLUEFOG_JOB_ID"] == lines["[0]"]["BLUEFOG_JOB_ID"] != ""
        assert v["BLUEFOG_COORDINATOR"] == lines["[0]"]["BLUEFOG_COORDINATOR"]


def test_two_jobs_differ_and_their_ports_are_no_ephemeral_ones():
    script = "echo $BLUEFOG_JOB_ID $BLUEFOG_COORDINATOR"
    jobs = [run("-np", 1, "--no-tag", "sh", "-c", script).stdout.split() for _ in range(2)]
    assert jobs[0][0] != jobs[1][0]
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for _, coordinator in jobs:
        host, port = coordinator.split(":")
        assert host == "127.0.0.1"
        assert low < 12_000 or not low <= int(port) <= high


def test_given_environment_goes_through():
    script = "echo $A,$B,$OMP_NUM_THREADS,$BLUEFOG_TIMELINE"
    args = ("--env", "A=1", "--env", "B=x=y z", "--timeline-filename", "trace_")
    out = run("-np", 1, *args, "sh", "-c", script, env={"OMP_NUM_THREADS": "5", "A": "0"}).stdout
    assert out == "[0] 1,x=y z,5,trace_\n"
    out = run("-np", 1, "--env", "OMP_NUM_THREADS=3", "sh", "-c", "echo $OMP_NUM_THREADS").stdout
    assert out == "[0] 3\n"


def test_more_ranks_than_a_host_takes_are_refused():
    result = run("-np", 100_000, "true")
    assert (result.returncode, result.stdout) == (2, "")
    assert "-np is 100000: 1 to 4096 ranks" in result.stderr
    script = 'ulimit -n 100 && "$0" run -np 50 true'
    result = subprocess.run(["sh", "-c", script, TOOL], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert (
        "-np 50 needs 164 open files, but the limit is 100: raise it (ulimit -n)" in result.stderr
    )


def test_verbose_says_what_it_set():
    result = run("-np", 1, "-v", "true")
    assert "OMP_NUM_THREADS=1" in result.stderr
    result = run("-np", 1, "-v", "true", env={"OMP_NUM_THREADS": "2"})
    assert "OMP_NUM_THREADS" not in result.stderr


@pytest.mark.parametrize("marker", [[], ["--"]])
def test_the_commands_own_options_are_left_alone(marker):
    result = run("-np", 1, *marker, "echo", "-v", "--np", "7", "--", "topo", "--env")
    assert (result.returncode, result.stdout) == (0, "[0] -v --np 7 -- topo --env\n")


def test_lines_are_whole_and_streams_apart():
    script = (
        "for i in $(seq 200); do printf '%s' aaaaaaaaaa; printf '%s\\n' $i; "
        "echo bbbbbbbbbb$i >&2; done"
    )
    result = run("-np", 8, "sh", "-c", script)
    for text, letter in ((result.stdout, "a"), (result.stderr, "b")):
        lines = text.splitlines()
        assert len(lines) == 8 * 200
        for r in range(8):
            mine = [line for line in lines if line.startswith(f"[{r}] ")]
            assert mine == [f"[{r}] {letter * 10}{i}" for i in range(1, 201)]


def test_last_line_empty_lines_and_progress_bars():
    out = run("-np", 1, "printf", r"a\n\n10%%\r20%%\r\nend").stdout
    assert out == "[0] a\n[0] \n[0] 10%\r[0] 20%\r\n[0] end\n"


def test_no_tag():
    assert run("-np", 2, "--no-tag", "echo", "x").stdout == "x\nx\n"


def test_standard_input_goes_to_rank_zero_only():
    out = run("-np", 2, "sh", "-c", "echo $(cat)", stdin=b"hello\n").stdout
    assert sorted(out.splitlines()) == ["[0] hello", "[1] "]


def test_more_ranks_than_cores():
    result = run("-np", 24, "sh", "-c", "echo $BLUEFOG_RANK")
    assert sorted(result.stdout.split("\n")[:-1]) == sorted(f"[{r}] {r}" for r in range(24))


def test_first_failure_gives_the_exit_code_and_ends_all(tmp_path):
    # Rank 1 fails once rank 0 and what rank 0 started are there.
    script = """
      if [ $BLUEFOG_RANK = 1 ]; then read line < $FIFO; exit 7; fi
      sleep 1000 & echo grandchild pid $!; echo rank pid $$; echo go > $FIFO; wait"""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    job = start("-np", 2, "--env", f"FIFO={fifo}", "sh", "-c", script)
    pids = read_pids(job, 2)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 7
    assert "rank 1 failed with exit code 7" in errors
    assert "SIGTERM to the ranks that still run: 0" in errors
    assert has_ended(pids)


def test_the_others_may_end_by_themselves():
    script = "[ $BLUEFOG_RANK = 0 ] && kill -KILL $$; sleep 0.5; echo said why; exit 3"
    result = run("-np", 2, "sh", "-c", script)
    assert result.returncode == 128 + signal.SIGKILL
    assert "rank 0 was killed by SIGKILL" in result.stderr
    assert result.stdout == "[1] said why\n"
    assert "SIGTERM" not in result.stderr


def test_a_rank_deaf_to_sigterm_is_killed():
    script = "[ $BLUEFOG_RANK = 0 ] && exit 4; trap '' TERM; while true; do sleep 100; done"
    begin = time.monotonic()
    result = run("-np", 2, "sh", "-c", script)
    assert result.returncode == 4
    assert "SIGKILL to the ranks that still run: 1" in result.stderr
    # 3 s to end by itself, 2 s after SIGTERM.
    assert time.monotonic() - begin > 4.5


READY = "trap 'echo got INT; exit 1' INT; sleep 1000 & echo pid $!; echo pid $$; wait"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_reaches_the_ranks_and_leaves_nothing(number, code):
    job = start("-np", 2, "sh", "-c", READY)
    pids = read_pids(job, 4)
    job.send_signal(number)
    out, errors = job.communicate(timeout=60)
    assert job.returncode == code
    assert sorted(out.splitlines()) == ["[0] got INT", "[1] got INT"]
    assert "failed with exit code" not in errors
    assert has_ended(pids)


def test_what_is_ignored_at_the_start_stays_ignored():
    # As under nohup, and as for `bluefog run … &` in a script.
    job = start("-np", 2, "sh", "-c", READY, ignore=(signal.SIGHUP, signal.SIGINT))
    pids = read_pids(job, 4)
    job.send_signal(signal.SIGHUP)
    job.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(timeout=0.5)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 143
    assert sorted(out.splitlines()) == ["[0] got INT", "[1] got INT"]
    assert has_ended(pids)


def test_second_ctrl_c_kills_at_once():
    job = start(
        "-np", 2, "sh", "-c", "trap '' INT TERM; echo pid $$; while true; do sleep 100; done"
    )
    pids = read_pids(job, 2)
    job.send_signal(signal.SIGINT)
    assert "passing SIGINT" in job.stderr.readline()
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "SIGKILL to the ranks that still run: 0, 1" in errors
    assert "SIGTERM" not in errors
    assert has_ended(pids)


def test_the_ranks_and_theirs_die_with_a_killed_launcher():
    script = "trap '' TERM; sleep 1000 & echo pid $!; echo pid $$; while true; do sleep 100; done"
    job = start("-np", 3, "sh", "-c", script)
    pids = read_pids(job, 6)
    job.kill()
    job.communicate(timeout=60)
    assert has_ended(pids)


def test_ctrl_c_is_answered_while_a_pager_does_not_read():
    job = start("-np", 1, "sh", "-c", "echo pid $$; exec yes")
    pids = read_pids(job, 1)
    time.sleep(0.5)  # All pipes are full.
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=10) == 130
    assert has_ended(pids)
    job.communicate(timeout=60)


def test_a_slow_reader_gets_everything():
    job = start("-np", 2, "sh", "-c", "seq 50000")
    time.sleep(0.5)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    for rank in range(2):
        mine = [line[4:] for line in out.splitlines() if line.startswith(f"[{rank}] ")]
        assert mine == [str(i + 1) for i in range(50000)]


def test_ends_when_nobody_reads():
    command = f"'{TOOL}' run -np 2 yes | head -n 1"
    result = subprocess.run(
        ["bash", "-c", command + "; exit ${PIPESTATUS[0]}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 128 + signal.SIGPIPE
    assert re.fullmatch(r"\[[01]\] y\n", result.stdout)


def test_command_that_cannot_be_started(tmp_path):
    result = run("-np", 4, "no-such-command-anywhere")
    assert result.returncode == 127
    assert "'no-such-command-anywhere': command not found" in result.stderr
    (tmp_path / "plain").write_text("text")
    result = run("-np", 2, tmp_path / "plain")
    assert result.returncode == 126
    assert "Permission denied" in result.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("-np", "0", "true"), "-np is 0"),
        (("-np", "-3", "true"), "-np is -3"),
        (("-np", "two", "true"), "two"),
        (("true",), "Give -np, or hosts with -H"),
        (("-H", "a:0", "true"), "of a '0' is no number of slots"),
        (("-H", "a:x", "true"), "of a 'x' is no number of slots"),
        (("-H", "a,,b", "true"), "'' is no name of a host"),
        (("-H", "-oProxyCommand=x", "true"), "is no name of a host"),
        (("-H", "a:2,b:2", "-np", "5", "true"), "-np is 5, but the hosts have 4 slots: a:2,b:2"),
        (("-H", "a", "--hostfile", "x", "true"), "give -H or --hostfile, not both"),
        (("--hostfile", "/no/file", "true"), "/no/file cannot be read"),
        (("-H", "a", "-p", "70000", "true"), "70000"),
        (("-np", "2"), "command"),
        (("-np", "2", "--env", "X", "true"), "NAME=VALUE"),
    ],
)
def test_wrong_calls_say_what_is_wrong(args, text):
    result = run(*args)
    assert result.returncode == 2
    assert text in result.stderr


def test_hostfiles(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "# two machines\n\nhost1 slots=2  # the first\nme@host2:3\n[2001:db8::1]:1\n2001:db8::2\n"
    )
    result = run("--hostfile", hosts, "--dry-run", "--cwd", "/data", "python", "a b.py")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:2] == ["7 ranks: python 'a b.py'", "in /data"]
    placed = [line.split(", started by: ssh -T -x ") for line in lines[2:6]]
    assert [p[0] for p in placed] == [
        "host1: ranks 0-1",
        "me@host2: ranks 2-4",
        "2001:db8::1: rank 5",
        "2001:db8::2: rank 6",
    ]
    assert [p[1].split()[-3] for p in placed] == ["host1", "me@host2", "2001:db8::1", "2001:db8::2"]
    assert "control plane: rank 0 at host1, a free port" in lines
    for text, wrong in (
        ("a slots=2\nb slots=two\n", "line 2: 'two' is no number of slots: give 1 to 4096"),
        ("a cores=2\n", "line 1: 'cores=2' is not understood"),
        ("a\n\n[2001:db8::1\n", "line 3: '[2001:db8::1' lacks its ]"),
        ("# nothing\n", "names no host"),
    ):
        hosts.write_text(text)
        result = run("--hostfile", hosts, "true")
        assert result.returncode == 2
        assert f"{hosts}" in result.stderr
        assert wrong in result.stderr


def test_ranks_fill_the_hosts_in_their_order():
    def placed(*args):
        out = run(*args, "--dry-run", "true").stdout
        return re.findall(r"^(\S+): ranks? (\S+), ", out, re.M)

    assert placed("-H", "a:2,b:2", "-np", "3") == [("a", "0-1"), ("b", "2")]
    assert placed("-H", "a:2,b:2", "-np", "2") == [("a", "0-1")]
    assert placed("-H", "a,b:2,a:2") == [("a", "0-2"), ("b", "3-4")]
    # Names of this host are one host, and need no ssh.
    assert placed("-H", f"localhost,127.0.0.1:2,{socket.gethostname()}") == [("localhost", "0-3")]


def test_a_dry_run_shows_no_values():
    args = ("-H", "a,localhost", "--dry-run", "--env", "KEY=secret", "--ssh-option", "User=me")
    out = run(*args, "--coordinator", "a:77", "true").stdout
    assert "KEY" in out
    assert "secret" not in out
    assert "localhost: rank 1, started from here" in out
    assert " -o User=me -o BatchMode=yes " in out
    assert "rank 0 at a:77\n" in out
    for given, shown in (("[fd00::1]:77", "[fd00::1]:77\n"), ("fd00::1", "fd00::1, a free port")):
        out = run("-H", "a,b", "--dry-run", "--coordinator", given, "true").stdout
        assert f"rank 0 at {shown}" in out


def test_names_of_this_host_need_no_ssh():
    result = run("-H", "localhost:2,127.0.0.1", "sh", "-c", "echo $BLUEFOG_LOCAL_RANK")
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(result.stdout.splitlines()) == ["[0] 0", "[1] 1", "[2] 2"]


def test_every_job_has_a_token(tmp_path):
    # Also behind a program that closes what it inherits.
    show = "import os; print(open(os.environ['BLUEFOG_TOKEN_FILE'], 'rb').read().hex())"
    between = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {show!r}])"
    env = {"BLUEFOG_TOKEN_FILE": "/theirs", "BLUEFOG_TOKEN_FD": "77"}
    jobs = [run("-np", 2, "--no-tag", sys.executable, "-c", between, env=env) for _ in range(2)]
    tokens = [job.stdout.split() for job in jobs]
    assert all(len(t) == 2 and t[0] == t[1] and len(t[0]) == 64 for t in tokens)
    assert tokens[0] != tokens[1]
    assert run("-np", 1, "--no-tag", "sh", "-c", "echo $BLUEFOG_TOKEN_FD", env=env).stdout == "\n"
