"""The study: what it expands to, what it refuses, what is left to do."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from haltscale.model import AdaptiveOptions, Method, VanillaOptions
from haltscale.platform.config import ConfigError
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps.sweep import Sweep, controls, grid, tuned


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


# ---- expanding ------------------------------------------------------------------------------------------------------


def test_the_sweep_is_expanded_over_the_base(study, base):
    runs = study().runs
    thinking = [replace(base, method=Method.ADAPTIVE, options=AdaptiveOptions(lam=lam, l_max=2)) for lam in (0.1, 0.5)]
    assert runs == [replace(base, options=VanillaOptions()), *thinking]
    assert study().problems() == []


def test_the_cheapest_run_comes_first(study):
    sweep = grid(size=["4m", "0.6m"], tokens=[4096, 1024]) + grid(method="adaptive", l_max=9, size="0.6m")
    wide = study(sweep=sweep)
    flops = [wide.flops_bound(run) for run in wide.runs]
    assert flops == sorted(flops)
    labels = [(run.size, str(run.method), run.tokens) for run in wide.runs]
    assert labels[0] == ("0.6m", "vanilla", 1024)
    assert labels[-1] == ("4m", "vanilla", 4096)


# ---- refusing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "../up", "", "..", "with space"])
def test_a_name_that_is_no_folder_is_refused(study, name):
    assert "not a valid study or run name" in only(study(name=name).problems())


def test_an_empty_sweep_is_refused(study):
    for sweep in (Sweep(()), grid(seed=[])):
        assert "the sweep is empty" in only(study(sweep=sweep).problems())


def test_duplicate_points_are_refused(study):
    twice = study(sweep=grid(method="adaptive", lam=[0.1, 0.5, 0.1]) + grid(method="adaptive", lam=0.5))
    problems = twice.problems()
    assert len(problems) == 2
    assert "point 3 is the same run as point 1" in problems[0]
    assert "point 4 is the same run as point 2" in problems[1]


def test_equal_numbers_are_duplicates(study):
    assert "same run as point 1" in only(study(sweep=grid(clip=[1, 1.0])).problems())


def test_an_unknown_axis_names_its_point(study):
    problem = only(study(sweep=grid(seed=1) + grid(lamda=[0.5])).problems())
    assert "point 2" in problem
    assert "'lamda'" in problem


def test_everything_wrong_is_told_at_once(study, corpus, tmp_path):
    broken = study(
        name="a/b",
        corpus=corpus(folder=str(tmp_path / "nowhere")),
        sweep=grid(size="9z") + grid(method="adaptive", lam=-1.0) + grid(nonsense=1),
        execution=ExecutionConfig(zero_stage=7),
    )
    problems = broken.problems()
    assert len(problems) == 6
    for refused in (lambda: broken.plan(), lambda: broken.runs):
        with pytest.raises(ConfigError) as refusal:
            refused()
        assert "nothing was started" in str(refusal.value)
    with pytest.raises(ConfigError) as refusal:
        broken.plan()
    assert refusal.value.problems == problems
    text = str(refusal.value)
    for word in ("'a/b'", "'9z'", "lam", "'nonsense'", "nowhere", "zero_stage"):
        assert word in text


def test_more_workers_than_the_cluster_has(study):
    wide = study(execution=ExecutionConfig(workers=2, cpus_per_worker=4))
    assert wide.problems() == []
    assert wide.problems({"CPU": 8}) == []
    assert "8 CPUs" in only(wide.problems({"CPU": 2}))


# ---- the plan and the results ---------------------------------------------------------------------------------------


def test_keys_follow_run_and_corpus(study, corpus, documents):
    keys = [study().key(run) for run in study().runs]
    assert len(set(keys)) == 3
    assert [study(execution=ExecutionConfig(workers=2)).key(run) for run in study().runs] == keys
    (documents / "document-0.txt").write_text("something else")
    assert not set(keys) & {study(corpus=corpus()).key(run) for run in study().runs}


def test_the_plan_tells_each_runs_state(study, author, store):
    tiny = study()
    keys = [tiny.key(run) for run in tiny.runs]
    assert tiny.plan(store)["state"].tolist() == ["planned"] * 3
    author.record(tiny.name, keys[0], loss=4.0)
    author.status(tiny.name, keys[1], "running")
    plan = tiny.plan(store)
    assert plan["key"].tolist() == keys
    assert plan["state"].tolist() == ["finished", "running", "planned"]
    assert plan["tokens"].tolist() == [1024] * 3
    assert plan["run"].tolist() == [run.label for run in tiny.runs]
    author.status(tiny.name, keys[1], "running", silent=10_000)
    author.status(tiny.name, keys[2], "failed", error="it broke")
    assert tiny.plan(store)["state"].tolist() == ["finished", "stalled", "failed"]


def test_tokens_in_the_plan_are_whole_steps(study, base, store):
    assert study(base=replace(base, tokens=1000)).plan(store)["tokens"].tolist() == [960] * 3


def test_results_have_a_row_for_every_run_of_the_study_and_no_other(study, author, store):
    tiny = study()
    keys = [tiny.key(run) for run in tiny.runs]
    author.plan(tiny.name, keys)
    author.spec(tiny.name, "an-earlier-run", "earlier")
    author.spec(tiny.name, keys[1], tiny.runs[1].label)
    author.record(tiny.name, keys[1], loss=4.0)
    results = tiny.results(store)
    assert results["key"].tolist() == keys
    assert results["state"].tolist() == ["planned", "finished", "planned"]
    assert results["loss"].tolist()[1] == 4.0
    assert results["loss"].isna().tolist() == [True, False, True]


def finish_all(study, store, author):
    for run in study.runs:
        key = study.key(run)
        author.spec(study.name, key, run.label)
        author.record(study.name, key, loss=4.0, identity=run.identity(study.corpus.name, study.corpus.fingerprint))
    author.plan(study.name, [study.key(run) for run in study.runs])


FINISHED = """
import sys
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.api import BytePairs, Corpus, Source
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps.study import Study
from haltscale.platform.sweeps.sweep import grid
study = Study(
    name="tiny-study",
    question="?",
    corpus=Corpus(
        name="tiny",
        sources={"texts": Source(path=sys.argv[1])},
        tokenizer=BytePairs(vocab_size=300),
        validation_documents=2,
    ),
    base=RunConfig(size="0.6m", tokens=1024, context=16, batch_tokens=64, precision=Precision.FP32),
    sweep=grid(method="adaptive", lam=[0.1, 0.5], l_max=2) + grid(method="vanilla"),
)
study.main(["--store", sys.argv[2]])
sys.exit(3 if "ray" in sys.modules else 0)
"""


def test_a_finished_study_runs_nothing_and_never_imports_ray(study, store, author, documents):
    finish_all(study(), store, author)
    before = sorted(Path(store.root).rglob("*"))
    arguments = [sys.executable, "-c", FINISHED, str(documents), store.root]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 3 runs are finished, nothing to train" in done.stdout
    assert sorted(Path(store.root).rglob("*")) == before


def test_only_what_is_missing_is_trained(study, store, author, monkeypatch):
    """The scheduler is handed the runs without a record, and nothing else."""
    from haltscale.platform import ray_connection
    from haltscale.platform.sweeps import ray_tune  # takes seconds to import

    handed = {}
    monkeypatch.setattr(ray_connection, "connected", lambda: contextlib.nullcontext({"CPU": 2}))
    monkeypatch.setattr(ray_tune, "run_missing", lambda study, missing, store: handed.update(missing))
    tiny = study()
    finish_all(tiny, store, author)
    more = study(sweep=tiny.sweep + grid(method="adaptive", lam=0.9, l_max=2))
    author.status(tiny.name, tiny.key(tiny.runs[0]), "failed")  # has a record all the same
    Path(store.path(tiny.name, tiny.key(tiny.runs[1]), "record.json")).unlink()
    more.run(store)
    assert set(handed) == {more.key(more.runs[3]), tiny.key(tiny.runs[1])}
    assert all(more.key(entry.run) == key for key, entry in handed.items())


def test_branches_wait_for_the_shorter_run(study, store, author, monkeypatch):
    """One stage for each budget of a family; what is no branch is trained in the first."""
    from haltscale.platform import ray_connection
    from haltscale.platform.sweeps import ray_tune  # takes seconds to import

    stages = []

    def trained(study, missing, store):
        stages.append({(str(entry.run.schedule), entry.run.tokens, entry.run.seed) for entry in missing.values()})
        for key in missing:
            author.record(study.name, key, loss=5.0)

    monkeypatch.setattr(ray_connection, "connected", lambda: contextlib.nullcontext({"CPU": 2}))
    monkeypatch.setattr(ray_tune, "run_missing", trained)
    sweep = grid(schedule="wsd", warmup_tokens=128, tokens=[1024, 2048, 4096], seed=[0, 1]) + grid(tokens=4096)
    study(sweep=sweep, execution=ExecutionConfig(branch=True)).run(store)
    wsd = [{("wsd", tokens, seed) for seed in (0, 1)} for tokens in (1024, 2048, 4096)]
    assert stages == [wsd[0] | {("cosine", 4096, 0)}, wsd[1], wsd[2]]


def test_branches_without_a_stable_phase_are_refused(study):
    problem = only(study(sweep=grid(schedule="wsd"), execution=ExecutionConfig(branch=True)).problems())
    assert "warmup_tokens" in problem


def test_a_study_that_the_cluster_cannot_hold_starts_nothing(study, store, monkeypatch):
    from haltscale.platform import ray_connection
    from haltscale.platform.sweeps import ray_tune  # takes seconds to import

    monkeypatch.setattr(ray_connection, "connected", lambda: contextlib.nullcontext({"CPU": 2}))
    monkeypatch.setattr(ray_tune, "run_missing", None)
    with pytest.raises(ConfigError, match="the cluster has 2"):
        study(execution=ExecutionConfig(workers=4)).run(store)
    assert store.studies() == []


# ---- the command line of a study ------------------------------------------------------------------------------------


def test_assignments_override_base_and_execution(study):
    changed = study().overridden(["tokens=128", "learning_rate=0.5", "workers=2", "size=1.8m", "precision=bf16"])
    assert changed.base.tokens == 128
    assert changed.base.learning_rate == 0.5
    assert changed.base.size == "1.8m"
    assert changed.execution.workers == 2
    assert changed.base.precision == "bf16"
    assert {run.tokens for run in changed.runs} == {128}
    assert study().base.tokens == 1024
    assert study().overridden([]) == study()


def test_a_part_of_a_study_keeps_its_keys_and_its_controls(study):
    learned = grid(method="adaptive", lam=[0.1, 0.3])
    whole = replace(study(), sweep=tuned(grid(method="vanilla"), over={"learning_rate": [1e-3, 2e-3]}) + learned)
    whole = replace(whole, sweep=whole.sweep + controls(of=learned, kinds=["dense"]))
    part = whole.only(["method=adaptive", "lam=0.3"])
    assert len(part.sweep) == 2
    assert [part.key(run) for run in part.runs] == [whole.key(run) for run in whole.runs if run.options.lam == 0.3]
    assert len(whole.only(["method=vanilla"]).sweep) == 1
    assert len(whole.only([f"size={whole.base.size}"]).sweep) == len(whole.sweep), "what the base says counts"


def test_a_part_that_is_none_is_refused(study):
    with pytest.raises(ConfigError, match="no point of the sweep is that"):
        study().only(["method=mor"])
    with pytest.raises(ConfigError, match="give FIELD=VALUE"):
        study().only(["vanilla"])


@pytest.mark.parametrize("assignment", ["tokenz=5", "nonsense=1", "=5", ""])
def test_an_assignment_to_nothing_is_refused(study, assignment):
    with pytest.raises(ConfigError, match="--set"):
        study().overridden([assignment])


def test_a_value_that_makes_no_sense_is_refused_by_the_check(study):
    problems = study().overridden(["tokens=many", "learning_rate="]).problems()
    assert any("tokens = 'many'" in problem for problem in problems)
    assert any("learning_rate = ''" in problem for problem in problems)


def test_all_wrong_assignments_are_told(study):
    with pytest.raises(ConfigError) as refusal:
        study().overridden(["tokenz=5", "tokens=128", "wurkers=2"])
    assert len(refusal.value.problems) == 2
    assert "did you mean 'tokens'" in refusal.value.problems[0]


def test_a_dry_run_shows_the_plan_and_starts_nothing(study, store, capsys, monkeypatch):
    monkeypatch.setattr(type(study()), "run", None)
    study().main(["--dry-run", "--store", store.root])
    out = capsys.readouterr().out
    for word in ("the plan", "planned", "adaptive · 0.6m · λ 0.5", "1.02k"):
        assert word in out
    assert not Path(store.root).exists()


def test_errors_end_with_a_sentence_and_exit_code_1(study, store, capsys):
    with pytest.raises(SystemExit) as stop:
        study(sweep=grid(size="9z")).main(["--dry-run", "--store", store.root])
    assert stop.value.code not in (0, None)
    assert "error: this study cannot run, nothing was started" in str(stop.value.code)


def test_runs_without_a_result_make_the_exit_code_non_zero(study, store, author, monkeypatch, capsys):
    tiny = study()
    finish_all(tiny, store, author)
    monkeypatch.setattr(type(tiny), "run", lambda self, store, **options: self.results(store))
    tiny.main(["--store", store.root])
    Path(store.path(tiny.name, tiny.key(tiny.runs[0]), "record.json")).unlink()
    author.status(tiny.name, tiny.key(tiny.runs[0]), "failed", error="the disk is full")
    with pytest.raises(SystemExit) as stop:
        tiny.main(["--store", store.root])
    assert "1 of 3 runs have no result" in str(stop.value.code)
    assert "the disk is full" in capsys.readouterr().out


def test_the_document_of_a_study_can_be_written(study, store):
    tiny = study(note="careful")
    store.write_json(store.path(tiny.name, None, "study.json"), tiny.document({"name": "tiny"}, store))
    read = RunStore(store.root).study(tiny.name)
    assert read["runs"] == [tiny.key(run) for run in tiny.runs]
    assert (read["question"], read["note"], read["corpus"]) == ("Does it think?", "careful", {"name": "tiny"})
    assert json.dumps(read)


# ---- failures, and namesakes ---------------------------------------------------------------------------------------


def test_what_failed_for_good_is_not_tried_again_unless_asked(study, store, author):
    tiny = study()
    keys = [tiny.key(run) for run in tiny.runs]
    author.status(tiny.name, keys[0], "diverged", cause="permanent", error="the loss is nan at step 3")
    author.status(tiny.name, keys[1], "failed", cause="permanent", error="ConfigError: no such model")
    author.status(tiny.name, keys[2], "failed", cause="transient", error="a node died")
    assert set(tiny.missing(store)) == {keys[2]}
    assert set(tiny.missing(store, retry_failed=True)) == set(keys)
    assert tiny.plan(store)["state"].tolist() == ["diverged", "failed", "failed"]
    longer = study(base=replace(tiny.base, tokens=2048))
    assert len(longer.missing(store)) == 3, "another identity is another run"


def test_a_capped_run_is_resumed_by_a_higher_limit(study, store, author):
    tiny = study(sweep=grid(seed=[0]), execution=ExecutionConfig(max_hours=2.0))
    author.status(tiny.name, tiny.key(tiny.runs[0]), "capped", cause="permanent", capped_hours=2.0)
    assert tiny.missing(store) == {}
    assert len(replace(tiny, execution=ExecutionConfig(max_hours=2.5)).missing(store)) == 1
    assert len(replace(tiny, execution=ExecutionConfig()).missing(store)) == 1
    assert replace(tiny, execution=ExecutionConfig(max_hours=1.0)).missing(store) == {}


def test_another_study_of_the_same_name_is_refused(study, store):
    mine = study(source="mine.py")
    store.write_json(store.path(mine.name, None, "study.json"), mine.document({}, store))
    assert replace(mine, question="Does it think twice?").namesake(store) == "", "a question may be put better"
    assert replace(mine, source="moved.py").namesake(store) == ""
    other = replace(mine, source="theirs.py", question="What is the weather?")
    with pytest.raises(ConfigError, match=r"another study named 'tiny-study' \(from mine.py.*--adopt"):
        other.run(store)


def test_a_record_of_schema_1_is_found_and_not_trained_again(study, store, author):
    """It stays in the folder that it was written to."""
    tiny = study(sweep=grid(seed=[0]))
    run = tiny.runs[0]
    now = tiny.identity(run)
    old = {name: value for name, value in now.items() if name not in ("schema", "shape")}
    old |= {"semantics": 1, "precision": "auto"}
    author.spec(tiny.name, "vanilla-0.6m-0123456789ab", "an old run", **old)
    author.record(tiny.name, "vanilla-0.6m-0123456789ab", loss=4.0, identity=old, precision="fp32")
    assert tiny.missing(store) == {}
    assert tiny.plan(store)["state"].tolist() == ["finished"]
    assert tiny.results(store)["key"].tolist() == ["vanilla-0.6m-0123456789ab"]
    assert tiny.document({}, store)["runs"] == ["vanilla-0.6m-0123456789ab"]
    other_precision = replace(tiny, base=replace(tiny.base, precision="bf16"))
    assert len(other_precision.missing(store)) == 1
