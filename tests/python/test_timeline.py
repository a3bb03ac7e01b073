"""What is seen of a real training: the timeline, the picture of one step, the hidden share."""

import json
from collections import defaultdict

import pytest
from ranks import run_script

from bluefog import viz

RANKS, STEPS = 3, 4

# Back-propagation stops between the two layers until the second one's bucket has left.
TRAINING = f"""
import os, time, torch
import bluefog.torch as bf

class UntilSent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        end = time.monotonic() + 30
        while bf.stats()["messages_sent"] < wanted and time.monotonic() < end:
            os.sched_yield()
        return gradient

bf.init(bf.topology.ring)
first, second = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 32, bias=False)
optimizer = bf.optim.DecentLaM([("first", first.weight), ("second", second.weight)], lr=0.1)
for step in range({STEPS}):
    wanted = bf.stats()["messages_sent"] + 2  # One to each neighbour.
    second(UntilSent.apply(first(torch.randn(8, 64)))).square().mean().backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("timeline") / "t_")
    # A bucket for each parameter, in two chunks for the first one.
    settings = {"BLUEFOG_BUCKET_BYTES": "0", "BLUEFOG_CHUNK_BYTES": "8K"}
    for result in run_script(RANKS, TRAINING, BLUEFOG_TIMELINE=path, **settings):
        assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def events(prefix):
    found = []
    for rank in range(RANKS):
        with open(f"{prefix}{rank}.json") as file:
            mine = json.load(file)
        assert {e["pid"] for e in mine} == {rank}
        assert mine[-1]["name"] == "bluefog_events_dropped" and mine[-1]["args"]["count"] == 0
        found += mine
    return found


def test_every_stage_of_every_step_is_there(events):
    ready = [e for e in events if e["name"] == "GRADIENT_READY"]
    waits = [e for e in events if e["name"] == "WAIT" and "step" in e["args"]]
    for rank in range(RANKS):
        assert [(e["args"]["step"], e["args"]["operation"]) for e in ready if e["pid"] == rank] == [
            (step, name) for step in range(STEPS) for name in ("second", "first")
        ]
        assert {e["args"]["step"] for e in waits if e["pid"] == rank} == set(range(STEPS))
    # Per rank and step: 2 chunks of "first", 1 of "second", each to 2 neighbours.
    buckets = [e for e in events if ".bucket" in e.get("args", {}).get("operation", "")]
    for name, count in (("PRODUCE", 3), ("PUBLISH", 6), ("RECEIVE", 6), ("COMBINE+CONSUME", 3)):
        assert sum(e["name"] == name for e in buckets) == RANKS * STEPS * count, name


def test_rows_can_be_drawn(events):
    """Spans of a row nest or do not meet; operations, which overlap, have ids of their own."""
    rows = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            rows[e["pid"], e["tid"]].append((e["ts"], -e["dur"], e["name"]))
    for row, spans in rows.items():
        ends = []
        for begin, negative, name in sorted(spans):
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or begin - negative <= ends[-1], (row, name, begin)
            ends.append(begin - negative)
    begun = [e["id"] for e in events if e["ph"] == "b"]
    assert len(begun) == len(set(begun))
    assert sorted(begun) == sorted(e["id"] for e in events if e["ph"] == "e")


def test_arrows_fit_and_clocks_agree(events):
    sent = {e["id"]: e for e in events if e["ph"] == "s"}
    received = {e["id"]: e for e in events if e["ph"] == "f"}
    assert len(sent) == sum(e["ph"] == "s" for e in events)
    assert len(received) == sum(e["ph"] == "f" for e in events)
    assert sent.keys() == received.keys()
    for end in received.values():
        begin = sent[end["id"]]
        assert begin["pid"] != end["pid"]
        assert begin["ts"] < end["ts"]
    # Viewers bind an end of an arrow to the span around it.
    for ends, name, other in ((sent, "PUBLISH", received), (received, "RECEIVE", sent)):
        for id_, end in ends.items():
            around = [
                e
                for e in events
                if e["ph"] == "X"
                and (e["pid"], e["tid"]) == (end["pid"], end["tid"])
                and e["ts"] <= end["ts"] < e["ts"] + e["dur"]
            ]
            assert [e["name"] for e in around] == [name]
            assert around[0]["args"]["peer"] == other[id_]["pid"]


def test_overlap_can_be_seen(events):
    for rank in range(RANKS):
        for step in range(STEPS):
            mine = [e for e in events if e["pid"] == rank]
            ready = {
                e["args"]["operation"]: e["ts"]
                for e in mine
                if e["name"] == "GRADIENT_READY" and e["args"]["step"] == step
            }
            begun = {
                e["args"]["operation"].rpartition(".")[2]: e["ts"]
                for e in mine
                if e["ph"] == "b" and e["args"].get("step") == step
            }
            wait = min(
                e["ts"] for e in mine if e["name"] == "WAIT" and e["args"].get("step") == step
            )
            published = [e["ts"] for e in mine if e["name"] == "PUBLISH"]
            assert ready["second"] < begun["bucket0"] < ready["first"] < begun["bucket1"]
            assert any(begun["bucket0"] < at < ready["first"] for at in published)
            assert ready["first"] < wait


def test_draw_step(prefix, events, tmp_path):
    picture = tmp_path / "step.png"
    figure = viz.draw_step(prefix, picture, step=2)
    assert 5_000 < picture.stat().st_size < 200_000
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:5] == ["rank 0  caller", "engine", "network", "in flight", "rank 1  caller"]
    assert axes.get_title() == f"step 2 of optimizer0 (decentlam), {RANKS} ranks"
    assert len(axes.texts) == RANKS * 6  # The arrows of this step.
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown >= {"compute", "wait", "produce", "combine, consume", "publish", "receive"}
    viz.draw_step(prefix)  # One of its own choice.


def test_what_cannot_be_drawn_is_named(prefix, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*BLUEFOG_TIMELINE"):
        viz.draw_step(tmp_path / "nowhere")
    # The first step has no step before, from whose end it could be drawn.
    for step in (0, STEPS):
        with pytest.raises(ValueError, match=f"no step {step}.*there are: 1 to {STEPS - 1}"):
            viz.draw_step(prefix, step=step)
    (tmp_path / "bad_0.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"bad_0\.json is not a timeline"):
        viz.draw_step(tmp_path / "bad_")
    (tmp_path / "none_0.json").write_text("[]")
    with pytest.raises(ValueError, match="has no step;"):
        viz.draw_step(tmp_path / "none_")
    with pytest.raises(ValueError, match="has no step of optimizer 1"):
        viz.draw_step(prefix, optimizer=1)


# Rank 1 publishes at once but takes a second to read what rank 0 sent.
SLOW_READER = """
import os, torch
if os.environ["BLUEFOG_RANK"] == "1":
    os.environ["BLUEFOG_FAILPOINTS"] = "engine.before_consume=sleep:1000"
import bluefog.torch as bf

bf.init(bf.topology.ring)
model = torch.nn.Linear(4, 4)
optimizer = bf.optim.DSGD(model.parameters(), lr=0.1, overlap=False)
model(torch.ones(1, 4)).sum().backward()
bf.barrier()
done = bf.stats()["ops_done"]
optimizer.step()
while bf.stats()["ops_done"] == done:  # Until rank 1 has read everything.
    os.sched_yield()
stats = bf.stats()
print(stats["busy_ns"] - stats["blocked_ns"])
"""


def test_what_neighbours_are_late_with_is_not_hidden_communication():
    for result in run_script(2, SLOW_READER):
        assert result.returncode == 0, result.stderr
        # Without overlap nothing is hidden, on neither side.
        assert int(result.stdout) < 500e6
