"""Fashion-MNIST on 8 ranks with three methods: what momentum costs on a graph, and its cure.

PmSGD averages gradients over all ranks; DmSGD and DecentLaM average models with two neighbours on a
ring. Every rank sees two or three kinds of clothing only. Prints a table, writes a picture. With
``--lab 4x2`` the ranks run on 4 hosts, which are network namespaces of this machine on shaped links
(needs root; see ``tests/net/lab.py``): shared memory inside hosts, UCX between them. Exits with 1
if DecentLaM does not come out as close to PmSGD, and as far above DmSGD, as it should.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bluefog import viz

LAB = Path(__file__).resolve().parents[1] / "tests" / "net" / "lab.py"
METHODS = {"pmsgd": "PmSGD", "dmsgd": "DmSGD", "decentlam": "DecentLaM"}


def hosts_and_ranks(text: str) -> tuple[int, int]:
    """``4x2``: 4 hosts of 2 ranks."""
    parts = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if parts is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOSTSxRANKS, as in 4x2")
    return int(parts[1]), int(parts[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument(
        "--lab", type=hosts_and_ranks, metavar="HOSTSxRANKS", help="over hosts of a network lab"
    )
    parser.add_argument("--rate", default="1gbit", help="of the lab's links (%(default)s)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "fashion_mnist.json"
    if shutil.which("bluefog") is None:
        sys.exit("demo: the bluefog command is not on the PATH; ci/demo.sh puts it there")
    # A bucket for each parameter: as one bucket, this small model would leave all at once with the
    # last gradient, and nothing could be hidden.
    setting = "BLUEFOG_BUCKET_BYTES=0"
    where = ""
    if args.lab is None:
        command = ["bluefog", "run", "-np", str(args.ranks), "--env", setting]
    else:
        hosts, per_host = args.lab
        args.ranks = hosts * per_host
        where = f" over {hosts} hosts at {args.rate}"
        command = ["env", setting, sys.executable, str(LAB), "--rate", args.rate]
        command += ["--hosts", str(hosts), "--ranks", str(per_host), "--"]
    command += [sys.executable, str(Path(__file__).with_name("fashion_mnist.py"))]
    command += ["--optimizer", ",".join(METHODS), "--topology", "ring", "--partition", "by-label"]
    command += ["--batch-size", "512", "--lr", "0.2", "--epochs", str(args.epochs)]
    command += ["--seeds", str(args.seeds), "--json", str(results)]
    print("$ " + " ".join(command), flush=True)
    begin = time.perf_counter()
    code = subprocess.run(command).returncode
    if code != 0:
        print(f"demo: the training failed with exit code {code}", file=sys.stderr)
        return code
    seconds = time.perf_counter() - begin

    runs = json.loads(results.read_text())
    print(
        f"\n{args.ranks} ranks{where}, ring, sorted by label, {args.epochs} epochs, "
        f"{args.seeds} seeds"
    )
    print(f"{'averaged model':>31}{'ranks':>20}{'consensus':>15}{'step':>8}{'hidden':>8}")
    print(
        f"{'method':14}{'mean':>6}  {'(min   – max  )'}{'mean':>9}{'worst':>8}"
        f"{'distance':>10}{'ms':>8}{'share':>8}"
    )
    means, curves = {}, {}
    for method, label in METHODS.items():
        mine = [r for r in runs if r["optimizer"] == method]
        accuracy = [r["acc_mean_model"] for r in mine]
        means[method] = float(np.mean(accuracy))
        curves[label] = [[p["acc_mean_model"] for p in r["curve"]] for r in mine]

        def mean(key: str, mine: list[dict] = mine) -> float:
            return float(np.mean([r[key] for r in mine]))

        print(
            f"{label:14}{means[method]:6.3f}  ({min(accuracy):.3f} – {max(accuracy):.3f})"
            f"{mean('acc_rank_mean'):9.3f}{min(r['acc_rank_min'] for r in mine):8.3f}"
            f"{mean('consensus'):10.4f}{mean('step_ms'):8.1f}{mean('hidden_share'):8.0%}"
        )
    picture = args.out / "demo.png"
    viz.plot_training(
        curves,
        picture,
        ylabel="test accuracy of the averaged model",
        title=f"Fashion-MNIST sorted by label, {args.ranks} ranks on a ring{where}",
    )
    print(f"\ntraining took {seconds:.0f} s; wrote {results} and {picture}")
    close = means["decentlam"] >= means["pmsgd"] - 0.01
    better = means["decentlam"] >= means["dmsgd"] + 0.02
    print(f"DecentLaM >= PmSGD - .01: {'yes' if close else 'NO'}")
    print(f"DecentLaM >= DmSGD + .02: {'yes' if better else 'NO'}")
    return 0 if close and better else 1


if __name__ == "__main__":
    sys.exit(main())
