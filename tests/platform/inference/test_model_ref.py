"""Models by name: finished runs, and the checkpoints of runs that go on, with a sentence for everything wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from haltscale.model import build_model
from haltscale.platform import cli
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import Precision
from haltscale.platform.corpora.corpus import HeldOutDocument
from haltscale.platform.corpora.tokenization import Pretrained
from haltscale.platform.evaluation.held_out import read_documents
from haltscale.platform.inference.model_ref import Reference, find_model, find_run, model_folder, own_corpus
from haltscale.platform.inference.models import LoadedModel, ModelFolderError, load_model
from haltscale.platform.store import RunStore
from haltscale.platform.training.engine import full_weights, snapshot, start
from haltscale.platform.training.loop import train
from haltscale.platform.training.progress import Progress

from looping import RUNS, VOCABULARY, Listener, batches, execution_of


def load(name: str, store: RunStore) -> LoadedModel:
    with model_folder(find_model(name, store), store) as folder:
        return load_model(folder)


def test_runs_by_name(store, author, finished):
    author.every_state()
    author.spec("quick", "finished-2", "vanilla again")
    folder = finished(folder=Path(store.path("quick", "finished", "model")))
    for name in ("quick/finished", "quick/vanilla finished"):
        with model_folder(find_model(name, store), store) as found:
            assert found == folder
    assert find_model(str(folder), store) == Reference(folder=folder)
    assert find_run(store, "quick", "runn") == "running"
    with pytest.raises(ModelFolderError, match="several runs match 'fi'") as refused:
        find_run(store, "quick", "fi")
    assert "quick/finished-2   vanilla again (planned)" in str(refused.value)
    for name, said in (
        ("quick/running", "a checkpoint of it is quick/running@latest"),
        ("quick/running@latest", "has no checkpoint yet"),
        ("quick/nothing", "no run is called 'nothing'"),
        ("slow/finished", "studies there: quick"),
        ("nothing", "neither a folder nor STUDY/RUN"),
    ):
        with pytest.raises(ModelFolderError, match=said):
            find_model(name, store)


def test_a_model_on_another_filesystem_is_copied(finished):
    folder = finished()
    store = RunStore("memory://models")
    store.write_json(store.path("s", None, "study.json"), {"name": "s", "runs": ["k"]})
    store.write_json(store.path("s", "k", "record.json"), {"loss": 1.0})
    for file in folder.iterdir():
        store.put_file(file, store.path("s", "k", "model", file.name))
    with model_folder(find_model("s/k", store), store) as copied:
        loaded = load_model(copied)
    assert not copied.exists()
    assert torch.equal(loaded.model.embedding.weight, load_model(folder).model.embedding.weight)


# Checkpoints ---------------------------------------------------------------------------------------------------------


class Trained:
    """A run that saves checkpoints, ``study/run`` of a store; what its weights were at each is remembered."""

    def __init__(self, store: RunStore, precision: Precision) -> None:
        self.store = store
        self.run = replace(RUNS["adaptive"], precision=precision)
        corpus = {"name": "tiny", "fingerprint": "f", "vocab_size": VOCABULARY}
        store.write_json(store.path("study", None, "study.json"), {"name": "study", "corpus": corpus, "runs": ["run"]})
        spec = {"label": "a run", "identity": self.run.identity("tiny", "f"), "execution": {}}
        store.write_json(store.path("study", "run", "spec.json"), spec)
        prepared = own_corpus(store, "study", "run")
        prepared.mkdir(parents=True)
        (prepared / "tokenizer.json").write_text(Pretrained(name="bytes").json)
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.meanwhile: dict[int, LoadedModel] = {}

    def train(self) -> None:
        execution = execution_of(self.run, checkpoints=3)
        checkpoints = Checkpoints(self.store, "study", "run")
        model = build_model(self.run.model_config(VOCABULARY), seed=self.run.seed)
        engine, progress = start(model, self.run, execution, checkpoints)

        def save(progress: Progress) -> None:
            checkpoints.write(snapshot(engine), progress.to_dict())
            checkpoints.wait()
            self.weights[progress.step] = full_weights(engine)
            self.meanwhile[progress.step] = load("study/run@latest", self.store)

        listener = Listener()
        listener.at_checkpoint = save
        train(engine, batches(self.run), self.run, progress, listener.hooks(), execution=execution)

    def folder(self, step: int) -> Path:
        return Path(self.store.path("study", "run", "checkpoints", f"step-{step:08d}"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALTSCALE_HOME", str(folder / "home"))
        made = Trained(RunStore(folder / "runs"), Precision.BF16)
        made.train()
    return made


@pytest.fixture
def run(trained, tmp_path, home) -> Trained:
    """The trained run in a store and a home of this test."""
    shutil.copytree(trained.store.root, tmp_path / "runs")
    shutil.copytree(Path(trained.store.root).parent / "home", home)
    own = Trained.__new__(Trained)
    own.__dict__.update(trained.__dict__, store=RunStore(tmp_path / "runs"))
    return own


def test_a_checkpoint_is_the_model_that_was_trained_so_far(run):
    """Also while the run goes on; weights in the precision that it trains in."""
    steps = sorted(run.weights)
    assert len(steps) == 3
    for step in steps:
        for loaded in (run.meanwhile[step], load(f"study/run@{step}", run.store)):
            own = loaded.model.state_dict()
            assert own.keys() == run.weights[step].keys()
            for name, weight in run.weights[step].items():
                assert own[name].dtype == torch.bfloat16
                assert torch.equal(own[name], weight), name
    first, last = (run.weights[step]["embedding.weight"] for step in (steps[0], steps[-1]))
    assert not torch.equal(first, last), "nothing was learned: the test has lost its subject"
    assert find_model("study/ru@latest", run.store) == Reference(study="study", key="run", step=steps[-1])
    assert find_model("study/ru@latest", run.store).name == f"study/run@{steps[-1]}"


def test_the_verbs_on_a_checkpoint(run, tmp_path, capsys):
    """Evaluated on the run's own corpus and kept by its step; asked to write; exported with what is known of it."""
    step, store = max(run.weights), run.store
    corpus = own_corpus(store, "study", "run")
    (corpus / "corpus.json").write_text(json.dumps({"name": "tiny"}))
    documents = {"document": ["a"], "source": ["x"], "bytes": [40], "tokens": [[0, *range(1, 41)]]}
    pq.write_table(pa.table(documents), corpus / "validation.parquet")
    rows = [{"step": 1, "loss": 9.0}, {"step": step, "loss": 4.125}]
    store.append_lines(store.path("study", "run", "evaluations.jsonl"), rows)

    def call(*arguments: str) -> str:
        cli.main([*arguments, "--store", store.root])
        return capsys.readouterr().out

    printed = json.loads(call("evaluate", "study/run@latest", "--json"))
    [held_out] = read_documents(load(f"study/run@{step}", store).model, [_document()], context=16).nll[None]
    assert printed["held-out-tiny"]["loss"] == pytest.approx(held_out.mean(dtype="float64"))
    stored = store.later_evaluations("study", "run", step=step)
    assert stored["held-out-tiny"]["loss"] == printed["held-out-tiny"]["loss"]
    assert store.later_evaluations("study", "run") == {}, "they are not the finished model's"
    assert store.evaluated_steps("study", "run") == [step]
    assert call("generate", f"study/run@{step}", "Once", "--tokens", "3").startswith("Once")
    call("export", "study/run@latest", str(tmp_path / "there"))
    card = (tmp_path / "there" / "README.md").read_text()
    assert "| held-out loss (nats per token) | 4.125 |" in card
    assert f"| training step | {step} |" in card


def _document() -> HeldOutDocument:
    return HeldOutDocument(name="a", bytes=40, tokens=np.array([0, *range(1, 41)]))


def test_a_damaged_checkpoint(run):
    *_, earlier, last = sorted(run.weights)
    [shard] = run.folder(last).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(ModelFolderError, match=rf"step {last} .*the hash differs; name another one, or latest"):
        load(f"study/run@{last}", run.store)
    assert find_model("study/run@latest", run.store).step == earlier
    for step in run.weights:
        for shard in run.folder(step).glob("*.safetensors"):
            shard.unlink()
    with pytest.raises(ModelFolderError, match=r"no checkpoint of study/run can be loaded: .* is missing"):
        find_model("study/run@latest", run.store)


def test_a_checkpoint_that_is_not_there(run):
    listed = ", ".join(map(str, sorted(run.weights)))
    for step in ("5000", "soon", "", "-1"):
        with pytest.raises(ModelFolderError, match=f"name a step .* has checkpoints of steps {listed}"):
            find_model(f"study/run@{step}", run.store)
    [manifest] = run.folder(max(run.weights)).glob("*.json")
    manifest.unlink()  # as if it were still being written
    with pytest.raises(ModelFolderError, match="name a step"):
        find_model(f"study/run@{max(run.weights)}", run.store)


def test_a_checkpoint_of_another_run(run):
    store, step = run.store, max(run.weights)
    other = replace(run.run, seed=1)
    spec = {"label": "another", "identity": other.identity("tiny", "f"), "execution": {}}
    store.write_json(store.path("study", "other", "spec.json"), spec)
    shutil.copytree(store.path("study", "run", "checkpoints"), store.path("study", "other", "checkpoints"))
    with pytest.raises(ModelFolderError, match="belongs to run run, not to other"):
        load(f"study/other@{step}", store)


def test_pickles_in_the_place_of_a_checkpoint_are_not_loaded(run):
    step = max(run.weights)
    for file in run.folder(step).iterdir():
        file.unlink()
    (run.folder(step) / "mp_rank_00_model_states.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFolderError, match="name a step"):
        find_model(f"study/run@{step}", run.store)


def test_the_tokenizer_of_a_checkpoint(run, monkeypatch, tmp_path, finished):
    """From the run's corpus on this machine, or from its finished model."""
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "elsewhere"))
    step = max(run.weights)
    with pytest.raises(ModelFolderError, match="its tokenizer is not on this machine"):
        load(f"study/run@{step}", run.store)
    finished(folder=Path(run.store.path("study", "run", "model")), vocab_size=VOCABULARY)
    assert load(f"study/run@{step}", run.store).tokenizer.get_vocab_size() == VOCABULARY
