"""Each file of a run's folder cut, emptied, doubled, of another type or schema: whoever reads the store goes on, names
the damaged one, and shows every other run as it was."""

import contextlib
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haltscale.dashboard import cached_store, data, html_report
from haltscale.platform import analysis, cli
from haltscale.platform.store import RunStore, StoreError
from haltscale.platform.sweeps import publishing, report

STUDY = "quick"
IDENTITY = {"method": "vanilla", "size": "0.6m", "seed": 0, "tokens": 100, "options": {}}
RECORD = {
    "identity": IDENTITY,
    "label": "sound",
    "loss": 3.0,
    "tokens": 100,
    "steps": 3,
    "flops_realised": 1e12,
    "parameters": {"embedding": 1, "attention": 2, "mlp": 3, "norms": 4, "method": 0, "head": 1},
    "parameters_total": 11,
    "mean_steps": 0.5,
    "steps_histogram": [0.5, 0.5],
    "halting": {"well_predicted_mean_steps": 0.1},
    "wall_seconds": 1.0,
}


def write(root: Path) -> RunStore:
    """A study of three runs: one finished that is to be damaged, a finished and a running one that stay sound."""
    store = RunStore(root)
    for key in ("harmed", "sound", "going"):
        spec = {"label": key, "study": STUDY, "key": key, "identity": IDENTITY, "execution": {}}
        store.write_json(store.path(STUDY, key, "spec.json"), spec)
        status = {"state": "running", "step": 1, "steps": 3, "error": None, "loss": 3.5}
        store.write_json(store.path(STUDY, key, "status.json"), status)
        os.utime(store.path(STUDY, key, "status.json"), (1.0, 1.0))
        rows = [{"step": step, "loss": 4.0 - step, "seconds": step, "flops_realised": 1e9 * step} for step in (1, 2)]
        store.append_lines(store.path(STUDY, key, "metrics.jsonl"), rows)
        evaluated = {"step": 2, "split": "validation", "loss": 3.2, "tokens": 90, "steps_histogram": [0.5, 0.5]}
        store.append_lines(store.path(STUDY, key, "evaluations.jsonl"), [evaluated])
        store.write_json(store.evaluation_path(STUDY, key, "controls"), {"arms": []})
        if key != "going":
            store.write_json(store.path(STUDY, key, "record.json"), {**RECORD, "label": key})
    document = {
        "name": STUDY,
        "question": "?",
        "note": "",
        "corpus": {"name": "c"},
        "runs": ["harmed", "sound", "going"],
    }
    store.write_json(store.path(STUDY, None, "study.json"), document)
    store.write_json(store.path("other", None, "study.json"), {"name": "other", "runs": []})
    return store


FILES = ("spec.json", "status.json", "record.json", "metrics.jsonl", "evaluations.jsonl", "evaluations/controls.json")
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400), st.just("\ud800[b]")
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _field_changed(content: bytes, value: object, pick: int) -> bytes:
    lines = content.split(b"\n") if content.count(b"\n{") else [content]
    document = json.loads(lines[0])
    names = sorted(document)
    document[names[pick % len(names)]] = value
    return b"\n".join([json.dumps(document).encode(), *lines[1:]])


HARMS = {
    "cut": lambda content, value, pick: content[: pick % (len(content) or 1)],
    "empty": lambda content, value, pick: b"",
    "doubled": lambda content, value, pick: content + content,
    "another type": lambda content, value, pick: json.dumps(value).encode(),
    "another schema": lambda content, value, pick: json.dumps({"schema": value, "loss": value}).encode(),
    "a field of another type": _field_changed,
    "deep": lambda content, value, pick: b'{"schema": 1, "identity": ' + b"[" * 100_000,
    "deep and whole": lambda content, value, pick: b"[" * 5_000 + b"]" * 5_000,
    "bytes": lambda content, value, pick: bytes((pick * n) % 256 for n in range(40)),
    "a parquet file": lambda content, value, pick: b"PAR1\x00\x00PAR1",
}


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def read_by_all(store: RunStore, folder: Path) -> None:
    """Every reader of the store."""
    for verb in (["status"], ["status", STUDY], ["status", "--json"], ["results", STUDY], ["results", STUDY, "--json"]):
        with contextlib.suppress(SystemExit):
            cli.main([*verb, "--store", store.root])
    with contextlib.suppress(SystemExit):
        cli.main(["results", STUDY, "--export", str(folder / "copy"), "--store", store.root])
    with contextlib.suppress(StoreError):  # where the study has no run to show
        html_report.document(store, STUDY)
    for reader in (store, cached_store.Shelf(store.root)):
        view = data.load_study(reader, STUDY)
        for key in ("harmed", "sound"):
            data.metrics(reader, STUDY, key)
            data.evaluations(reader, STUDY, key)
            reader.later_evaluations(STUDY, key)
        analysed = data.analysed(view.runs)
        for ask in (analysis.seed_noise, analysis.importance, analysis.isoflop, analysis.fit_recurrence):
            ask(analysed)


def sound_ones(store: RunStore) -> None:
    """The runs that nobody touched are as they were."""
    runs = report.results(store, STUDY).set_index("key")
    assert runs.loc["sound", "loss"] == 3.0
    assert runs.loc["sound", "state"] == "finished"
    assert not runs.loc["sound", "error"]
    view = data.load_study(store, STUDY).runs.set_index("key")
    assert view.loc["sound", "state"] == "finished"
    assert view.loc["going", "state"] == "stalled"


@settings(
    max_examples=max(12, settings().max_examples // 8),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(file=st.sampled_from(FILES), harm=st.sampled_from(sorted(HARMS)), value=anything, pick=st.integers(0, 10_000))
def test_a_damaged_file_of_a_run_costs_no_other(tmp_path_factory, file, harm, value, pick):
    root = tmp_path_factory.mktemp("store")
    store = write(root / "runs")
    path = Path(store.path(STUDY, "harmed", *file.split("/")))
    path.write_bytes(HARMS[harm](path.read_bytes(), value, pick))
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("error")
        read_by_all(store, root)
        sound_ones(store)
    shutil.rmtree(root)


@settings(
    max_examples=max(6, settings().max_examples // 16),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(harm=st.sampled_from(sorted(HARMS)), value=anything, pick=st.integers(0, 10_000))
def test_a_damaged_study_shows_its_runs_all_the_same(tmp_path_factory, harm, value, pick):
    root = tmp_path_factory.mktemp("store")
    store = write(root / "runs")
    path = Path(store.path(STUDY, None, "study.json"))
    path.write_bytes(HARMS[harm](path.read_bytes(), value, pick))
    with silence():
        read_by_all(store, root)
        sound_ones(store)
    shutil.rmtree(root)


@pytest.mark.parametrize("file", ["study.json", *(f"harmed/{name}" for name in FILES)])
def test_a_folder_in_the_place_of_a_file(tmp_path, file, capsys):
    store = write(tmp_path / "runs")
    path = Path(store.path(STUDY)) / file
    path.unlink()
    path.mkdir()
    read_by_all(store, tmp_path)
    sound_ones(store)


NAMES = ["../../etc", "", "sound/../going", 3, None, ["sound"], "x" * 300, "\ud800"]


def test_a_study_that_names_what_is_no_run(tmp_path, capsys):
    store = write(tmp_path / "runs")
    document = {"schema": 1, "name": STUDY, "runs": [*NAMES, "sound", "sound"]}
    Path(store.path(STUDY, None, "study.json")).write_text(json.dumps(document))
    read_by_all(store, tmp_path)
    sound_ones(store)
    assert report.results(store, STUDY)["key"].tolist().count("sound") == 1
    assert "../../etc" in store.views(STUDY, ["../../etc"])["../../etc"].problem
    with pytest.raises(SystemExit, match="runs is a list, needs a list of texts"):
        cli.main(["status", STUDY, "--store", store.root])
    assert {run.key for run in publishing.publish(store, STUDY, tmp_path / "second").runs(STUDY)} == {"sound"}


def test_nobody_is_told_to_delete_a_study(tmp_path):
    store = write(tmp_path / "runs")
    Path(store.path(STUDY, None, "study.json")).write_text("{")
    told = store.study_problem(STUDY)
    assert "study.json is damaged" in told
    assert "its runs are kept" in told
    assert "remove" not in told
