"""The line about a sweep, with a clock that the test moves."""

import pytest

from haltscale.platform.sweeps.progress import MOST_BARS, SweepProgress, describe


class Clock:
    now = 500.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sweep(store, author, clock):
    """Two runs, the second three times as expensive."""
    for key in ("cheap", "dear"):
        author.spec("study", key, f"the {key} one")
    return SweepProgress(store, "study", {"cheap": 1e9, "dear": 3e9}, clock)


def test_before_anything_has_happened(sweep):
    assert sweep.lines() == ["0/2 runs |   0 % | time left: not known yet"]


def test_the_share_is_by_flops_and_the_time_left_by_the_clock(sweep, author, clock):
    sweep.lines()
    author.status("study", "cheap", "running", step=5, steps=10, loss=4.125, mean_steps=1.25)
    clock.now += 60.0
    # half of a quarter in 60 s: seven more eighths need 420 s
    assert sweep.lines() == [
        "  █████░░░░░ the cheap one: 5/10 loss 4.12 steps 1.25",
        "0/2 runs |  12 % | about 7:00 left",
    ]
    author.status("study", "cheap", "finished", step=10, steps=10)
    author.record("study", "cheap", loss=3.5)
    author.status("study", "dear", "running", step=1, steps=3)
    clock.now += 3540.0
    assert sweep.lines() == [
        "  finished the cheap one: loss 3.500 nats/token, mean steps 1.50, 12 s of training",
        "  ███░░░░░░░ the dear one: 1/3",
        "1/2 runs |  50 % | about 1:00:00 left",
    ]


def test_each_end_is_told_once(sweep, author):
    author.status("study", "dear", "failed", error="the disk is full")
    assert sweep.lines()[0] == "  failed the dear one: the disk is full"
    assert len(sweep.lines()) == 1
    author.record("study", "cheap", loss=3.5)
    first, last = sweep.lines()
    assert first.startswith("  finished the cheap one")
    assert last.startswith("2/2 runs | 100 %")
    assert "0:00 left" in last
    assert len(sweep.lines()) == 1


def test_what_was_done_before_does_not_count_as_speed(store, author, clock):
    """A resumed run that begins at 90 % has not done 90 % in no time."""
    author.status("study", "key", "running", step=90, steps=100)
    sweep = SweepProgress(store, "study", {"key": 1.0}, clock)
    assert "time left: not known yet" in sweep.lines()[-1]
    author.status("study", "key", "running", step=95, steps=100)
    clock.now += 30.0
    assert "about 0:30 left" in sweep.lines()[-1]


def test_a_run_shows_its_speed_its_time_left_and_what_went_wrong(sweep, author):
    speed = {"tokens_per_second": 12_345.0, "flops_per_second": 6.54e9, "seconds_left": 75.0}
    events = [{"step": 3, "what": "the loss exploded to 60.0"}]
    author.status("study", "dear", "running", step=9, steps=10, loss=5.0, **speed, events=events)
    assert sweep.lines()[0] == (
        "  █████████░ the dear one: 9/10 loss 5.00 | 12.3 k tokens/s | 6.54 GFLOP/s | 1:15 left"
        " | ! the loss exploded to 60.0"
    )
    author.status("study", "dear", "running", step=9, steps=10, loss=5.0, **speed, mfu=0.314)
    assert "| 6.54 GFLOP/s | 31% MFU | 1:15 left" in sweep.lines()[0]


def test_a_damaged_run_is_described_by_its_problem(store, author):
    author.spec("study", "key", "label")
    store.fs.pipe_file(store.path("study", "key", "status.json"), b"{")
    assert "damaged" in describe(store.run("study", "key"))


def test_a_finished_run_is_not_read_again_and_a_failed_one_is(store, author, clock, monkeypatch):
    keys = ("finished", "failed", "planned")
    sweep = SweepProgress(store, "study", dict.fromkeys(keys, 1.0), clock)
    author.record("study", "finished", loss=3.5)
    author.status("study", "failed", "failed", error="the disk is full")
    assert "2/3 runs" in sweep.lines()[-1]
    asked = []
    views = store.views
    monkeypatch.setattr(store, "views", lambda study, keys: (asked.extend(keys), views(study, keys))[1])
    author.status("study", "failed", "running", step=1, steps=2)  # tried again
    assert "1/3 runs |  50 %" in sweep.lines()[-1]
    assert asked == ["failed", "planned"]


def test_of_many_that_train_some_are_shown(store, author, clock):
    keys = [f"run-{index:03d}" for index in range(MOST_BARS + 5)]
    for key in keys:
        author.status("study", key, "running", step=1, steps=2)
    *bars, more, last = SweepProgress(store, "study", dict.fromkeys(keys, 1.0), clock).lines()
    assert [key in bar for key, bar in zip(keys, bars, strict=False)] == [True] * MOST_BARS
    assert more == "  ... and 5 more that train"
    assert last.startswith(f"0/{len(keys)} runs |  50 %")
