"""Pictures of topologies, of training and of what happened in a step; needs matplotlib.

>>> from bluefog import topology, viz
>>> viz.draw_topology(topology.ring(8), "ring.png")  # doctest: +SKIP

Also a command: ``python -m bluefog.viz --help``.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import _timeline
from . import topology as _topology
from .topology import AnyTopology, Topology, _rounds

__all__ = ["draw_step", "draw_topology", "plot_training"]


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("bluefog.viz draws with matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    if path is not None:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    return figure


def draw_topology(topology: AnyTopology, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw the ranks on a circle and the edges with their weights as line width.

    A line without an arrow is an edge in both directions with equal weights.

    Parameters
    ----------
    topology : Topology or TopologySequence
        Of a sequence every round is drawn beside the others.
    path : path, optional
        Where to save the picture; the suffix decides the format.

    Returns
    -------
    matplotlib.figure.Figure
    """
    rounds = _rounds(topology)
    n = topology.size
    columns = min(len(rounds), 4)
    rows = math.ceil(len(rounds) / columns)
    side = min(10.0, 4.0 * max(1.0, math.sqrt(n / 16)))  # In inches.
    figure = _new_figure(side * columns, side * rows)
    for r, graph in enumerate(rounds):
        axes = figure.add_subplot(rows, columns, r + 1)
        _draw_round(axes, graph, node=min(16.0, 130.0 * side / n))
        suffix = "" if len(rounds) == 1 else f", round {r}"
        axes.set_title(f"{topology.name}, {n} rank{'s' if n > 1 else ''}{suffix}")
    return _finish(figure, path)


def _draw_round(axes: Any, graph: Topology, node: float) -> None:
    """``node``: diameter of a rank's circle, in points."""
    n = graph.size
    matrix = graph.to_matrix()
    angle = np.pi / 2 - 2 * np.pi * np.arange(n) / n
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    between = matrix - np.diag(np.diag(matrix))
    heaviest = max(between.max(), 1e-12)
    thick = min(2.5, 15.0 / max(1, np.count_nonzero(between, axis=1).max()))
    for i, j in zip(*np.nonzero(matrix)):
        if i == j or (matrix[j, i] == matrix[i, j] and i > j):
            continue
        both = matrix[j, i] == matrix[i, j]
        arrow = {
            "arrowstyle": "-" if both else "-|>",
            "connectionstyle": "arc3,rad=0" if both else "arc3,rad=0.12",
            "linewidth": 0.3 + thick * matrix[i, j] / heaviest,
            "color": "tab:blue",
            "alpha": 0.7,
            "shrinkA": node / 2 + 1,
            "shrinkB": node / 2 + 1,
        }
        axes.annotate("", xy=points[j], xytext=points[i], arrowprops=arrow)
    axes.scatter(*points.T, s=node**2, color="white", edgecolors="black", zorder=3)
    for rank, (x, y) in enumerate(points):
        axes.text(x, y, str(rank), ha="center", va="center", zorder=4, fontsize=0.56 * node)
    axes.set_xlim(-1.15, 1.15)
    axes.set_ylim(-1.15, 1.15)
    axes.set_aspect("equal")
    axes.axis("off")


def plot_training(
    curves: Mapping[str, Sequence[Any]],
    path: str | os.PathLike[str] | None = None,
    *,
    x: Sequence[float] | None = None,
    xlabel: str = "epoch",
    ylabel: str = "test accuracy",
    title: str | None = None,
) -> Any:
    """Plot training curves: the mean over seeds as a line, their range as a band.

    Parameters
    ----------
    curves : {label: values}
        Values are ``[points]``, or ``[seeds][points]``.
    path : path, optional
        Where to save the picture; the suffix decides the format.
    x : sequence of float, optional
        Abscissae; default 1, 2, …

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = _new_figure(7, 4.5)
    axes = figure.add_subplot()
    for label, values in curves.items():
        table = np.atleast_2d(np.asarray(values, dtype=float))
        at = np.arange(1, table.shape[1] + 1) if x is None else np.asarray(x, dtype=float)
        (line,) = axes.plot(at, table.mean(axis=0), label=label)
        if len(table) > 1:
            axes.fill_between(
                at, table.min(axis=0), table.max(axis=0), alpha=0.2, color=line.get_color()
            )
    if x is None:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return _finish(figure, path)


def draw_step(
    prefix: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    step: int | None = None,
    optimizer: int | None = None,
) -> Any:
    """Draw one optimizer step of a timeline: what every rank did, and which messages went where.

    Four rows a rank: the caller computes (grey) or waits in ``step()`` (red), with a tick where a
    gradient became ready; the engine produces, combines and consumes; messages leave and arrive,
    joined by arrows; and a bar for each bucket from its submission to its end. Where an engine or
    network row has colour above a grey caller row, communication is hidden.

    Parameters
    ----------
    prefix : path
        The value that ``BLUEFOG_TIMELINE`` had: all files ``<prefix><rank>.json`` are read.
    path : path, optional
        Where to save the picture; the suffix decides the format.
    step : int, optional
        Which step; default: the one of median length.
    optimizer : int, optional
        Of which optimizer, counted from 0 in the order in which they were made; default: the one
        with the most steps.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    FileNotFoundError
        No file of this prefix.
    ValueError
        A file that is not a timeline, or a step that is not in all of them.
    """
    timeline = _timeline.Timeline(os.fspath(prefix), optimizer)
    if step is None:
        step = timeline.typical_step()
    figure = _new_figure(10, 1.2 + 0.95 * len(timeline.events))
    _timeline.draw(timeline, step, figure)
    return _finish(figure, path)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bluefog.viz", description="Draw a picture.")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="one step of a timeline")
    step.add_argument("prefix", help="the value that BLUEFOG_TIMELINE had")
    step.add_argument("--step", type=int, help="default: the one of median length")
    step.add_argument("--optimizer", type=int, help="default: the one with the most steps")
    topology = commands.add_parser("topology", help="the graph of a topology")
    topology.add_argument("name", help="as in `bluefog topo --list`")
    topology.add_argument("-n", type=int, required=True, help="number of ranks")
    for command in (step, topology):
        command.add_argument("-o", "--output", required=True, help="png, svg or pdf file")
    args = parser.parse_args()
    try:
        if args.command == "step":
            draw_step(args.prefix, args.output, step=args.step, optimizer=args.optimizer)
        else:
            draw_topology(_topology.make(args.name, args.n), args.output)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    _main()
