"""The plan of a study: controls that wait, what is stale, what is expected, and every error at once."""

import contextlib
import json
import math
from dataclasses import fields, replace

import pytest

from haltscale.model import Method, VanillaOptions
from haltscale.platform.config import ConfigError
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.identity import SEMANTICS
from haltscale.platform.store import RunState
from haltscale.platform.sweeps import planning
from haltscale.platform.sweeps.sweep import controls, grid, isoflop

LEARNED = grid(method="adaptive", lam=0.5, l_max=2)


def finish(study, store, author, run, **record):
    """Write a record for a run, as its training would."""
    identity = study.identity(run)
    values = {"tokens": run.tokens, "flops_realised": 1e9, "passes_per_token": 2.126, "identity": identity}
    values["steps_schedule"] = [[0, 0.1, 0.2, 0.7], [0.5, 0.2, 0.3, 0.5]]
    values["steps_histogram"] = [0.25, 0.25, 0.5]
    author.spec(study.name, study.key(run), run.label, **identity)
    author.record(study.name, study.key(run), loss=4.0, **(values | record))


def states(study, store):
    plan = study.plan(store)
    return dict(zip(plan["run"], plan["state"], strict=True))


# ---- controls -------------------------------------------------------------------------------------------------------


def test_controls_wait_and_then_match_what_was_spent(study, store, author):
    controlled = study(sweep=LEARNED + controls(of=LEARNED))
    (subject,) = controlled.runs
    assert list(states(controlled, store).values()) == ["planned"] + ["waiting"] * 4
    assert controlled.plan(store)["key"].tolist()[1:] == [""] * 4
    assert set(controlled.missing(store)) == {controlled.key(subject)}

    vanilla = replace(subject, method=Method.VANILLA, options=VanillaOptions())
    per_batch = planning.cost(vanilla, 300).bound * 64
    finish(controlled, store, author, subject, flops_realised=per_batch * 50.3, tokens=64 * 20)
    missing = {entry.control: (key, entry) for key, entry in controlled.missing(store).items()}
    assert missing["dense"][1].run == replace(vanilla, tokens=64 * 50)
    plan = controlled.plan(store).set_index("key")
    for kind, near in (("dense", 0.02), ("wider", 0.07)):  # the smallest models have few neighbours
        assert plan.loc[missing[kind][0], "flops_expected"] == pytest.approx(per_batch * 50.3, rel=near)
    wider = missing["wider"][1].run
    assert wider.shape.layers * wider.shape.d > 2 * 64
    assert wider == replace(vanilla, tokens=64 * 20, size=wider.size)
    for kind in ("fixed", "shuffled"):
        run = missing[kind][1].run
        schedule = ((0.0, 0.1, 0.2, 0.7), (0.5, 0.2, 0.3, 0.5), (1.0, 0.25, 0.25, 0.5))
        options = replace(subject.options, steps_from=kind, steps_schedule=schedule, steps_seed=subject.seed)
        assert run == replace(subject, options=options)
        assert run.problems(300) == []
        assert run.label.startswith(f"adaptive/{kind} · ")
        assert "0.25" not in missing[kind][1].label
        back = type(run).from_identity(json.loads(json.dumps(controlled.identity(run))))
        assert back.canonical() == run.canonical()
    document = controlled.document({}, store)
    assert document["controls"] == {
        key: {"kind": kind, "of": controlled.key(subject)} for kind, (key, _) in missing.items()
    }
    assert set(document["runs"]) == {controlled.key(subject), *(key for key, _ in missing.values())}


def test_a_budget_in_flops_is_the_controls_too(study, store, author):
    """A replay ends when it has spent what its subject spent, so that the rates follow the same course."""
    learned = grid(method="adaptive", lam=0.5, l_max=2, flops=1e9)
    controlled = study(sweep=learned + controls(of=learned, kinds=["shuffled"]))
    (subject,) = controlled.runs
    finish(controlled, store, author, subject)
    ((_, entry),) = controlled.missing(store).items()
    assert (entry.run.flops, entry.run.steps) == (1e9, None)


def test_a_subject_without_a_schedule_has_to_be_trained_again(study, store, author):
    controlled = study(sweep=LEARNED + controls(of=LEARNED, kinds=["fixed", "dense"]))
    finish(controlled, store, author, controlled.runs[0], steps_schedule=None)
    assert sorted(states(controlled, store).values()) == ["finished", "planned", "waiting"]


def test_a_plain_control_may_have_a_rate_of_its_own(study, store, author):
    rates = {"dense": 0.02, "wider": 0.03}
    own = sum((controls(of=LEARNED, kinds=[kind], learning_rate=rate) for kind, rate in rates.items()), LEARNED)
    controlled = study(sweep=own)
    (subject,) = (run for run in controlled.runs if run.method is Method.ADAPTIVE)
    finish(controlled, store, author, subject)
    found = {str(entry.control): entry.run.learning_rate for entry in controlled.missing(store).values()}
    assert found == rates
    wrong = study(sweep=LEARNED + controls(of=LEARNED, kinds=["dense"], learning_rate=-1.0))
    assert "the dense control of" in " ".join(wrong.problems())
    assert "learning_rate" in " ".join(wrong.problems())


def test_a_control_that_the_sweep_has_already_is_not_run_twice(study, store, author):
    base = study().base
    sweep = LEARNED + grid(method="vanilla", tokens=64 * 50) + controls(of=LEARNED, kinds=["dense"])
    both = study(sweep=sweep)
    (subject,) = (run for run in both.runs if run.method is Method.ADAPTIVE)
    vanilla = replace(base, method=Method.VANILLA, options=VanillaOptions())
    finish(both, store, author, subject, flops_realised=planning.cost(vanilla, 300).bound * 64 * 50)
    assert len(both.plan(store)) == 2


@pytest.mark.parametrize("times", [1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("size", ["0.6m", "1.8m", "4m"])
def test_a_wider_model_spends_as_much(base, times, size):
    plain = replace(base, size=size)
    spent = times * planning.cost(plain, 300).bound * plain.tokens
    wider = replace(plain, size=planning.size_for(spent, plain, 300))
    assert wider.problems(300) == []
    assert planning.cost(wider, 300).bound * wider.tokens == pytest.approx(spent, rel=0.06 if size == "0.6m" else 0.03)
    assert wider.shape.layers >= plain.shape.layers
    assert wider.shape.d >= plain.shape.d


def test_stages_follow_each_other_until_nothing_is_left(study, store, author, monkeypatch):
    """The second stage is what the first one made known; a run that failed is not tried for ever."""
    from haltscale.platform import ray_connection
    from haltscale.platform.sweeps import ray_tune  # takes seconds to import

    two = LEARNED + grid(method="adaptive", lam=0.1, l_max=2)
    staged = study(sweep=two + controls(of=two, kinds=["dense"]))
    stages = []

    def train(study, missing, store):
        stages.append([entry.label for entry in missing.values()])
        for entry in missing.values():
            if entry.run.method is Method.VANILLA or entry.run.options.lam == 0.5:
                finish(study, store, author, entry.run, flops_realised=1e10)

    monkeypatch.setattr(ray_connection, "connected", lambda: contextlib.nullcontext({"CPU": 2}))
    monkeypatch.setattr(ray_tune, "run_missing", train)
    staged.run(store)
    assert [len(stage) for stage in stages] == [2, 1]
    assert sorted(staged.plan(store)["state"]) == ["finished", "finished", "planned", "waiting"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (grid(method="vanilla") + controls(of=grid(method="vanilla")), "the dense control is not for vanilla"),
        (grid(method="vanilla") + controls(of=grid(method="vanilla")), "the wider control is not for vanilla"),
        (
            grid(method="looped") + controls(of=grid(method="looped"), kinds=["fixed"]),
            "not for looped, since it has no router",
        ),
        (grid(method="shuffled") + controls(of=grid(method="shuffled"), kinds=["fixed"]), "itself a control"),
        (
            grid(method="adaptive", router="none") + controls(of=grid(method="adaptive", router="none")),
            "not with router none",
        ),
        (LEARNED + controls(of=LEARNED, kinds=["fixed"], learning_rate=1e-3), "keeps its subject's learning rate"),
        (grid(method="vanilla") + controls(of=LEARNED), "the sweep has no such run to control"),
        (LEARNED + controls(of=LEARNED) + controls(of=LEARNED), "given twice"),
        (LEARNED + controls(of=grid(method="adaptive", lamda=1)), "did you mean 'lam'"),
    ],
)
def test_a_control_of_nothing_is_refused(study, sweep, message):
    assert any(message in problem for problem in study(sweep=sweep).problems())


# ---- what is known before ------------------------------------------------------------------------------------------


def test_nothing_is_invented(study, store):
    plan = study().plan(store).set_index("method")
    assert plan["seconds"].isna().all()
    assert plan.loc["adaptive", "flops_expected"].isna().all()
    assert plan.loc["vanilla", "flops_expected"] == plan.loc["vanilla", "flops_bound"]
    assert (plan["memory_bytes"] > 0).all()


def test_finished_runs_tell_what_to_expect(study, store, author):
    known = study(sweep=LEARNED * grid(seed=[0, 1]) + grid(method="vanilla"))
    first, other = (run for run in known.runs if run.method is Method.ADAPTIVE)
    execution = {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0}
    finish(known, store, author, first, flops_realised=5e9, wall_seconds=20.0, execution=execution)
    plan = known.plan(store).set_index("key")
    assert plan.loc[known.key(other), "flops_expected"] == pytest.approx(5e9)
    assert plan.loc[known.key(other), "seconds"] == pytest.approx(20.0)
    assert plan["seconds"].isna().sum() == 1
    elsewhere = replace(known, execution=ExecutionConfig(workers=2))
    assert elsewhere.plan(store)["seconds"].isna().all()


@pytest.mark.parametrize("drift", ["corpus", "code"])
def test_what_was_finished_before_a_drift_is_stale_and_not_mixed_in(
    study, corpus, store, author, monkeypatch, drift, documents
):
    old = study()
    run = old.runs[0]
    finish(old, store, author, run)
    assert old.plan(store)["state"].tolist()[0] == "finished"
    if drift == "code":
        monkeypatch.setitem(SEMANTICS, "loop", 10_000)
        now = study()
    else:
        (documents / "document-0.txt").write_text("other words now")
        now = study(corpus=corpus())
    plan = now.plan(store)
    assert plan["state"].tolist() == ["stale", "planned", "planned"]
    assert now.key(run) in now.missing(store)
    assert now.results(store)["loss"].isna().all()


def test_isoflop_designs_spend_the_same(study, store):
    design = study(sweep=isoflop(sizes=["0.6m", "1.8m"], flops=[1e10, 1e11], method=["vanilla", "fixed", "adaptive"]))
    plan = design.plan(store)
    assert len(plan) == 12
    budgets = plan["flops_expected"].map(lambda flops: min((1e10, 1e11), key=lambda b: abs(math.log(flops / b))))
    assert (abs(plan["flops_expected"] / budgets - 1) < 0.02).all()
    assert plan[plan["method"] != "adaptive"].groupby(["method", "size"])["tokens"].nunique().eq(2).all()


def test_runs_with_the_same_name_are_told_apart(study, store):
    plan = study(sweep=grid(tokens=[1024, 2048], learning_rate=1e-3)).plan(store)
    assert plan["run"].tolist() == ["vanilla · 0.6m · tokens 1024", "vanilla · 0.6m · tokens 2048"]


# ---- errors --------------------------------------------------------------------------------------------------------


def test_bad_studies_get_all_their_errors_at_once(study, store, author):
    broken = study(
        name="ok",
        sweep=grid(learning_rat=1e-3, clip=-1)
        + grid(tokens_per_paramter=20)
        + grid(training_flops=1.0)
        + grid(tokens=3)
        + grid(tokens=2048, tokens_per_parameter=2),
    )
    author.spec("ok", "earlier", "earlier")
    store.fs.pipe_file(store.path("ok", "earlier", "record.json"), b'{"schema": 99}')
    with pytest.raises(ConfigError) as refusal:
        broken.run(store)
    text = str(refusal.value)
    for complaint in (
        "did you mean 'learning_rate'",
        "clip = -1",
        "did you mean 'tokens_per_parameter'",
        "training_flops 1 is less than one batch of 64",
        "tokens must be at least one batch, 64 (got 3)",
        "tokens and tokens_per_parameter are two budgets",
        "has schema 99",
    ):
        assert complaint in text, text


def test_a_size_that_does_not_fit_is_refused_before_it_starts(study):
    large = study(sweep=grid(size=["0.6m", "2.8b"], method=["vanilla", "adaptive"]))
    (problem,) = large.problems({"CPU": 2, "node_memory": 8e9})
    assert "size 2.8b needs" in problem
    assert "(adaptive" in problem, "which keeps more than vanilla"
    assert "8.0 GB" in problem
    assert large.problems({"CPU": 2, "node_memory": 80e9}) == []
    shared = replace(large, execution=ExecutionConfig(workers=4, zero_stage=3))
    assert shared.problems({"CPU": 4, "node_memory": 20e9}) == []


# ---- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [field.name for field in fields(ExecutionConfig)])
def test_a_key_knows_nothing_of_the_execution(study, name):
    value = getattr(ExecutionConfig(), name)
    other = value + 1 if isinstance(value, int | float) and not isinstance(value, bool) else None
    changed = study(execution=replace(ExecutionConfig(), **{name: other}))
    assert [changed.key(run) for run in changed.runs] == [study().key(run) for run in study().runs]


def test_status_shows_what_is_running_and_what_waits(study, store, author):
    controlled = study(sweep=LEARNED + controls(of=LEARNED, kinds=["dense"]))
    author.status(controlled.name, controlled.key(controlled.runs[0]), "running", step=3, loss=5.0)
    status = controlled.status(store)
    assert status["state"].tolist() == [RunState.RUNNING, "waiting"]
    assert status["step"].tolist()[0] == 3
