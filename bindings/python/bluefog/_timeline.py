"""Reads the timeline files of a job and draws one step of them; see :func:`bluefog.viz.draw_step`.

What lies in the files: docs/timeline.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._errors import BluefogValueError

# The rows of a rank from top to bottom, and the "tid" of their events (bluefog_core/base/trace.h).
_ROWS = ["caller", "engine", "network", "in flight"]
_CALLER, _ENGINE, _NETWORK = 1, 2, 3
_COLORS = {
    "compute": ("#d9d9d9", "compute"),
    "WAIT": ("#d62728", "wait"),
    "PRODUCE": ("#1f77b4", "produce"),
    "STAGE": ("#17becf", "stage"),
    "COMBINE": ("#2ca02c", "combine, consume"),
    "PUBLISH": ("#ff7f0e", "publish"),
    "RECEIVE": ("#9467bd", "receive"),
    "in flight": ("#bcbd22", "bucket under way"),
}
_SAME_COLOR = {"COMBINE+CONSUME": "COMBINE", "CONSUME": "COMBINE", "MEASURE": "COMBINE"}


class Timeline:
    """The events of all ranks of a job, as ``BLUEFOG_TIMELINE`` had them written.

    Parameters
    ----------
    prefix : path
        The value of ``BLUEFOG_TIMELINE``.
    optimizer : int, optional
        Which one, counted from 0 in the order in which they were made; default: that with the most
        steps.

    Raises
    ------
    FileNotFoundError
        No file of this prefix.
    ValueError
        A file that is not a timeline (named), or no optimizer step in any.
    """

    def __init__(self, prefix: str | Path, optimizer: int | None = None) -> None:
        path = Path(prefix)
        name = re.compile(
            re.escape("" if str(prefix).endswith("/") else path.name) + r"(\d+)\.json"
        )
        folder = path if str(prefix).endswith("/") else path.parent
        files = {}
        if folder.is_dir():
            files = {int(m[1]): f for f in folder.iterdir() if (m := name.fullmatch(f.name))}
        if not files:
            raise FileNotFoundError(
                f"no timeline {prefix}<rank>.json: give the prefix that BLUEFOG_TIMELINE had"
            )
        self.prefix, self.title = str(prefix), ""
        self.events = {rank: _read(file) for rank, file in sorted(files.items())}
        self._waits: dict[int, dict[int, list[tuple[float, float]]]] = {}
        self._select(optimizer)

    def _select(self, optimizer: int | None) -> None:
        """Look at the steps of one optimizer only."""
        waits = {rank: _step_waits(events) for rank, events in self.events.items()}
        counts: dict[str, int] = {}
        for of_rank in waits.values():
            for title, _ in of_rank:
                counts[title] = counts.get(title, 0) + 1
        if optimizer is not None:
            counts = {t: n for t, n in counts.items() if t.startswith(f"optimizer{optimizer} ")}
        if not counts:
            which = "" if optimizer is None else f" of optimizer {optimizer}"
            raise BluefogValueError(
                f"the timeline {self.prefix}*.json has no step{which}; all that is in it can be "
                "seen at https://ui.perfetto.dev"
            )
        self.title = max(counts, key=lambda title: counts[title])
        self._waits = {
            rank: {step: spans for (title, step), spans in of_rank.items() if title == self.title}
            for rank, of_rank in waits.items()
        }

    def steps(self) -> list[int]:
        """Steps that can be drawn: every rank has this one and the one before."""
        common = set.intersection(*(set(waits) for waits in self._waits.values()))
        return sorted(step for step in common if step - 1 in common)

    def typical_step(self) -> int:
        """The step of median length."""
        steps = self.steps()
        if not steps:
            raise BluefogValueError(
                f"the timeline {self.prefix}*.json has no two successive steps of all ranks"
            )
        return sorted(steps, key=lambda step: self._length(step))[len(steps) // 2]

    def _length(self, step: int) -> float:
        begin, end = self.span(step)
        return end - begin

    def span(self, step: int) -> tuple[float, float]:
        """First begin and last end of a step over the ranks, in µs of the common clock."""
        ranks = [self.rank_span(rank, step) for rank in self.events]
        return min(b for b, _ in ranks), max(e for _, e in ranks)

    def rank_span(self, rank: int, step: int) -> tuple[float, float]:
        """From the end of step() of the step before to the end of that of this one, in µs."""
        waits = self._waits[rank]
        if step not in waits or step - 1 not in waits:
            steps = self.steps()
            known = f"{steps[0]} to {steps[-1]}" if steps else "none"
            raise BluefogValueError(f"rank {rank} has no step {step} to draw; there are: {known}")
        return waits[step - 1][-1][1], waits[step][-1][1]

    def waits(self, rank: int, step: int) -> list[tuple[float, float]]:
        """(begin, end) of the times in which step() waited; one wait may come in pieces."""
        return self._waits[rank][step]

    def spans(self, rank: int, step: int) -> list[dict[str, Any]]:
        """What the engine did for the buckets of a step: events of the engine and the network."""
        windows = {name: (begin, end) for name, begin, end in self.operations(rank, step)}
        # A bucket may still be read by neighbours when the next step has begun.
        for name, begin, _ in self.operations(rank, step + 1):
            if name in windows:
                windows[name] = (windows[name][0], min(windows[name][1], begin))
        found = []
        for e in self.events[rank]:
            if e["ph"] == "X" and e["tid"] in (_ENGINE, _NETWORK):
                begin, end = windows.get(e["args"]["operation"], (math.inf, math.inf))
                if begin <= e["ts"] < end:
                    found.append(e)
        return found

    def messages(self, step: int) -> list[tuple[int, float, int, float]]:
        """(sender, time, receiver, time) of the messages of a step."""
        begun = {
            (rank, e["ts"])
            for rank in self.events
            for e in self.spans(rank, step)
            if e["name"] == "PUBLISH"
        }
        sent = {
            e["id"]: (rank, e["ts"])
            for rank, events in self.events.items()
            for e in events
            if e["ph"] == "s" and (rank, e["ts"]) in begun
        }
        return [
            (*sent[e["id"]], rank, e["ts"])
            for rank, events in self.events.items()
            for e in events
            if e["ph"] == "f" and e["id"] in sent
        ]

    def operations(self, rank: int, step: int) -> list[tuple[str, float, float]]:
        """(name, begin, end) of the buckets of a step, in order of their begin."""
        begun, found = {}, []
        prefix = self.title.split(" ")[0] + "."
        for e in self.events[rank]:
            if (
                e["ph"] == "b"
                and e["args"].get("step") == step
                and e["args"]["operation"].startswith(prefix)
            ):
                begun[e["id"]] = e
            elif e["ph"] == "e" and e["id"] in begun:
                begin = begun.pop(e["id"])
                found.append((begin["args"]["operation"], begin["ts"], e["ts"]))
        return sorted(found, key=lambda operation: operation[1])


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        events = json.loads(file.read_text())
        ordered = sorted((e for e in events if e["ph"] != "M"), key=lambda e: e["ts"])
    except (ValueError, KeyError, TypeError) as error:
        raise BluefogValueError(f"{file} is not a timeline of bluefog: {error}") from error
    return ordered


def _step_waits(
    events: Sequence[dict[str, Any]],
) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """The waits of step(), by optimizer and step."""
    waits: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for e in events:
        if e["name"] == "WAIT" and "step" in e["args"]:
            key = (e["args"]["operation"], e["args"]["step"])
            waits.setdefault(key, []).append((e["ts"], e["ts"] + e["dur"]))
    return waits


def draw(timeline: Timeline, step: int, figure: Any) -> None:
    """Draw one step of all ranks onto an empty figure."""
    from matplotlib.patches import Patch

    ranks = list(timeline.events)
    begin, end = timeline.span(step)
    height = len(_ROWS) + 0.7  # Of a rank, in rows.
    axes = figure.add_subplot()
    used = set()

    def y(rank: int, row: str) -> float:
        return ranks.index(rank) * height + _ROWS.index(row)

    def bar(
        rank: int, row: str, what: str, at: float, to: float, size: float = 0.8, up: float = 0
    ) -> None:
        what = _SAME_COLOR.get(what, what)
        if what not in _COLORS or to < begin or at > end:
            return
        used.add(what)
        # Short ones would be thinner than a pixel.
        shown = max(to - at, (end - begin) / 1500)
        axes.broken_barh(
            [((at - begin) / 1e3, shown / 1e3)],
            (y(rank, row) - 0.4 + up, size),
            facecolors=_COLORS[what][0],
            linewidth=0,
        )

    for rank in ranks:
        _draw_rank(timeline, step, rank, bar)
        first, last = timeline.rank_span(rank, step)
        for e in timeline.events[rank]:
            if e["name"] == "GRADIENT_READY" and first <= e["ts"] <= last:
                at = (e["ts"] - begin) / 1e3
                axes.plot([at, at], [y(rank, "caller") - 0.4, y(rank, "caller") + 0.4], "k", lw=0.8)
    _draw_arrows(timeline, step, axes, begin, y)

    axes.set_xlim(0, (end - begin) / 1e3)
    axes.set_ylim(len(ranks) * height - 0.9, -0.8)
    axes.set_yticks(
        [y(rank, row) for rank in ranks for row in _ROWS],
        [f"rank {rank}  {row}" if row == _ROWS[0] else row for rank in ranks for row in _ROWS],
        fontsize=8,
    )
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms")
    count = f"{len(ranks)} rank" + ("s" if len(ranks) > 1 else "")
    axes.set_title(f"step {step} of {timeline.title}, {count}")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles = [
        Patch(color=color, label=text) for what, (color, text) in _COLORS.items() if what in used
    ]
    handles += [
        axes.plot([], [], "k|", ms=9, label="gradient ready")[0],
        axes.plot([], [], color="0.4", lw=0.8, label="message")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def _draw_rank(timeline: Timeline, step: int, rank: int, bar: Any) -> None:
    at, _ = timeline.rank_span(rank, step)
    for wait_begin, wait_end in timeline.waits(rank, step):
        bar(rank, "caller", "compute", at, wait_begin)
        bar(rank, "caller", "WAIT", wait_begin, wait_end)
        at = wait_end
    rows = {_ENGINE: "engine", _NETWORK: "network"}
    for e in timeline.spans(rank, step):
        bar(rank, rows[e["tid"]], e["name"], e["ts"], e["ts"] + e["dur"])
    operations = timeline.operations(rank, step)
    lanes = _lanes([(op_begin, op_end) for _, op_begin, op_end in operations])
    size = 0.8 / (max(lanes, default=0) + 1)
    for lane, (_, op_begin, op_end) in zip(lanes, operations):
        bar(rank, "in flight", "in flight", op_begin, op_end, size * 0.85, lane * size)


def _lanes(spans: Sequence[tuple[float, float]]) -> list[int]:
    """A number for each span, so that those of one number do not meet; spans in order of begin."""
    ends: list[float] = []
    numbers = []
    for begin, end in spans:
        lane = next((i for i, e in enumerate(ends) if e <= begin), len(ends))
        ends[lane : lane + 1] = [end]
        numbers.append(lane)
    return numbers


def _draw_arrows(timeline: Timeline, step: int, axes: Any, begin: float, y: Any) -> None:
    for source, sent, target, received in timeline.messages(step):
        axes.annotate(
            "",
            xy=((received - begin) / 1e3, y(target, "network")),
            xytext=((sent - begin) / 1e3, y(source, "network")),
            arrowprops={
                "arrowstyle": "-|>,head_width=0.12,head_length=0.25",
                "color": "0.4",
                "lw": 0.5,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            annotation_clip=True,
        )
