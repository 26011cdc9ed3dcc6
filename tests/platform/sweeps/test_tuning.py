"""Tuning studies: what they ask for follows from seed and results alone, and is marked."""

import contextlib
import math

import pytest

from haltscale.model import Method
from haltscale.platform.sweeps.spec import Halving
from haltscale.platform.sweeps.sweep import choice, grid, integers, log_uniform
from haltscale.platform.sweeps.tuning import Search, TuningStudy

SPACE = {"lam": log_uniform(0.01, 1.0), "l_max": integers(1, 3)}


@pytest.fixture
def tuning(corpus, base):
    def build(**changes):
        values = {"name": "tuned", "question": "Which lam?", "corpus": corpus(), "base": base, "space": SPACE}
        return TuningStudy(**(values | {"sweep": grid(method=Method.ADAPTIVE), "samples": 8} | changes))

    return build


@pytest.fixture
def trained(store, author, monkeypatch):
    """Runs a tuning study with a trainer that writes a made-up loss, lowest at lam = 0.1; gives the stages' keys."""
    from haltscale.platform import ray_connection
    from haltscale.platform.sweeps import ray_tune  # takes seconds to import

    def run(study, *, stop_after=99):
        stages = []

        def train(study, missing, store):
            assert study.role == "tuning"
            if len(stages) == stop_after:
                raise KeyboardInterrupt
            stages.append(list(missing))
            for key, entry in missing.items():
                loss = 4.0 + abs(math.log10(entry.run.options.lam / 0.1))
                author.spec(study.name, key, entry.label, **study.identity(entry.run))
                author.record(study.name, key, loss=loss, flops_realised=1e9 * entry.run.options.l_max)

        monkeypatch.setattr(ray_connection, "connected", lambda: contextlib.nullcontext({"CPU": 2}))
        monkeypatch.setattr(ray_tune, "run_missing", train)
        with contextlib.suppress(KeyboardInterrupt):
            study.run(store)
        return stages

    return run


def test_random_search_is_one_stage_and_more_samples_keep_the_first(tuning, trained, store):
    assert [len(stage) for stage in trained(tuning())] == [8]
    assert trained(tuning()) == []
    assert [len(stage) for stage in trained(tuning(samples=10))] == [2]
    assert len(tuning(samples=10).results(store)) == 10


def test_a_search_by_tpe_goes_in_rounds_and_on_where_it_was_killed(tuning, trained, store, tmp_path, author):
    pytest.importorskip("optuna", reason="needs haltscale[tuning]")
    tpe = tuning(search=Search.TPE, samples=12, batch=3)
    killed = trained(tpe, stop_after=2)
    assert len(killed) == 2
    rest = trained(tpe)
    assert sum(len(stage) for stage in [*killed, *rest]) == 12
    assert len({key for stage in [*killed, *rest] for key in stage}) == 12
    assert trained(tpe) == []

    from haltscale.platform.store import RunStore

    author.store = other = RunStore(tmp_path / "other")
    stages = []
    while more := list(tpe.missing(other)):
        stages.append(more)
        for key, entry in tpe.missing(other).items():
            loss = 4.0 + abs(math.log10(entry.run.options.lam / 0.1))
            author.record(tpe.name, key, loss=loss, flops_realised=1e9 * entry.run.options.l_max)
    assert stages == [*killed, *rest], "the same runs as in a search that was left alone"


def test_tpe_learns(tuning, trained, store):
    pytest.importorskip("optuna", reason="needs haltscale[tuning]")
    tpe = tuning(search=Search.TPE, samples=24, batch=3, space={"lam": log_uniform(1e-4, 100)})
    rounds = trained(tpe)
    losses = [[store.run("tuned", key).record["loss"] for key in stage] for stage in rounds]
    assert min(map(min, losses[4:])) < min(map(min, losses[:4])), "the first rounds are drawn at random"
    assert tpe.best(store)["loss"].tolist() == [min(min(stage) for stage in losses)]


def test_two_objectives_give_all_that_nothing_beats(tuning, trained, store):
    study = tuning(objectives=("loss", "flops_realised"), samples=12)
    trained(study)
    best, everything = study.best(store), study.results(store)
    assert 1 <= len(best) <= 3
    for row in everything.itertuples():
        assert ((best["loss"] <= row.loss) & (best["flops_realised"] <= row.flops_realised)).any()


def test_what_was_ended_early_is_not_run_again(tuning, trained, store, author):
    study = tuning(halving=Halving())
    keys = list(study.missing(store))
    author.status("tuned", keys[0], "stopped", step=3)
    assert keys[0] not in study.missing(store)
    assert study.plan(store)["state"].tolist().count("stopped") == 1


def test_equal_draws_are_one_run(tuning, store):
    assert len(tuning(space={"l_max": choice(1, 2)}, samples=10).plan(store)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"lamda": log_uniform(0.1, 1)}}, "did you mean 'lam'"),
        ({"sweep": grid(method="adaptive", seed=[0, 1])}, "one point"),
        ({"samples": 0}, "samples must be an integer of at least 1 (got 0)"),
        ({"search": "grid"}, "one of random, tpe"),
        ({"objectives": ("los",)}, "objectives must be one or more of"),
        ({"search": Search.TPE, "halving": Halving()}, "requires search='random'"),
    ],
)
def test_a_search_for_nothing_is_refused(tuning, changes, message):
    assert any(message in problem for problem in tuning(**changes).problems())
