"""How soon every rank knows that one is gone: killed, stopped, or behind a link that is cut.

2 hosts of 2 ranks, busy with small averages on a ring. The time runs from the fault until the last
surviving rank has raised; a rank that does not raise within 10 s is a failed trial.
"""

from __future__ import annotations

import contextlib
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench

PATIENCE = 10.0
SCRIPT = """
import time, numpy as np, bluefog as bf
bf.init(bf.topology.ring)
x = np.zeros(1000, np.float32)
bf.barrier()
print("going", flush=True)
try:
    while True:
        bf.neighbor_allreduce(x, name="x")
except bf.BluefogError as error:
    print(time.monotonic(), error, flush=True)
"""


def trial(lab: bench.Lab, fault: str, env: dict[str, str]) -> tuple[float, str]:
    """Seconds until the last rank has raised (infinite: not all did) and what it said."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    job = lab.start([sys.executable, "-uc", SCRIPT], env=env, **pipes)
    victim = job[-1]
    try:
        for p in job:
            if p.stdout.readline() != "going\n":
                raise RuntimeError("a rank did not start")
        time.sleep(0.2)
        since = time.monotonic()
        if fault == "cut":
            lab.cut(1)
        else:
            victim.send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        last, said = 0.0, ""
        for p in job if fault == "cut" else job[:-1]:
            left = max(0.1, since + PATIENCE - time.monotonic())
            line = p.stdout.readline() if select.select([p.stdout], [], [], left)[0] else ""
            when, _, text = line.partition(" ")
            if not when:
                return float("inf"), "nothing"
            if float(when) - since > last:
                last, said = float(when) - since, text.strip()
        return last, said
    finally:
        for p in job:
            p.kill()
            p.communicate()
        with contextlib.suppress(RuntimeError):  # It was not cut.
            lab.heal(1)


def main() -> None:
    arguments = bench.parser(__doc__, rounds=20)
    options = arguments.parse_args()
    bench.build()
    env = {"PYTHONPATH": str(bench.BUILD / "python"), "BLUEFOG_LOG_LEVEL": "off"}
    targets = {"killed": 0.1, "stopped": 2.0, "cut": 2.0}
    seconds: dict[str, list[float]] = {fault: [] for fault in targets}
    said = dict.fromkeys(targets, "")
    with bench.network(2, 2) as lab:
        for _ in range(options.rounds):
            for fault, times in seconds.items():
                took, text = trial(lab, fault, env)
                if not times or took > max(times):
                    said[fault] = text
                times.append(took)
    report = bench.Report(f"detection, {options.rounds} trials each")
    for fault, times in seconds.items():
        share = sum(t <= targets[fault] for t in times) / len(times)
        report.value(f"{fault}: median", [t * 1e3 for t in times], "ms")
        report.value(f"{fault}: within {targets[fault]:g} s", [share * 100], "%", at_least=100)
        print(f"{fault}: the slowest trial, {max(times):.3f} s: {said[fault]}")
        print(f"{fault}: p90 {statistics.quantiles(times, n=10)[-1] * 1e3:.0f} ms")
    report.print(options.json)


if __name__ == "__main__":
    main()
