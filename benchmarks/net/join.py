"""How long it takes until a job of many ranks has come together: rendezvous with a token.

The ranks are threads of a few processes of this machine and have no engine; rank 0, which serves
the control plane, has a process for itself. From the start of all of them until the last one holds
the address book.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("-np", type=int, default=1000, help="ranks (%(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="of the ranks (%(default)s)")
    options = parser.parse_args()
    bench.build("bench_join")
    report = bench.Report(f"{options.np} ranks join a job")
    command = [str(bench.BUILD / "benchmarks" / "bench_join"), str(options.np)]
    rounds = []
    for _ in range(options.rounds):
        done = subprocess.run(
            [*command, str(options.processes)], check=True, capture_output=True, text=True
        )
        rounds.append(json.loads(done.stdout))
    report.value("all have joined", [r["seconds"] for r in rounds], "s")
    report.value("processor time of rank 0", [r["server_cpu_s"] for r in rounds], "s")
    report.value("threads of rank 0", [r["server_threads"] for r in rounds], "")
    report.value("memory of rank 0, peak", [r["server_peak_mib"] for r in rounds], "MiB")
    report.print(options.json)


if __name__ == "__main__":
    main()
