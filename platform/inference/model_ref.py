"""Find the model that a name means, and put it where it can be loaded from.

A model is named as ``STUDY/RUN`` (the finished run's; the beginning of its key will do), as ``STUDY/RUN@STEP`` or
``STUDY/RUN@latest`` (a training checkpoint's, also while the run goes on), or by the folder that holds it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from haltscale.model import METHODS
from haltscale.platform.checkpoints import WEIGHT, CheckpointError, Checkpoints
from haltscale.platform.config import Precision, RunConfig, current_identity
from haltscale.platform.corpora.corpus import recorded_end_of_text
from haltscale.platform.corpora.shared import SharedFolder, is_url, shared_root
from haltscale.platform.corpora.tokenization import END_OF_TEXT
from haltscale.platform.inference.models import FILES, TOKENIZER_CONFIG, ModelFolderError, end_of_text_config
from haltscale.platform.store import RunState, RunStore, haltscale_home

LATEST = "latest"
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A model that was named."""

    folder: Path | None = None
    """Where it lies; None for a run of the store."""
    study: str = ""
    key: str = ""
    """Of the run."""
    step: int | None = None
    """Of the run's training checkpoint; None for its finished model."""

    @property
    def name(self) -> str:
        """The name that means this model and no other, whatever happens meanwhile."""
        if self.folder is not None:
            return str(self.folder.absolute())
        return f"{self.study}/{self.key}" + (f"@{self.step}" if self.step is not None else "")


def find_model(name: str, store: RunStore) -> Reference:
    """The model that a name means.

    Raises:
        ModelFolderError: there is no such run, folder or checkpoint, or the run is not finished.
    """
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # no such user; a name too long; a null character
        if Path(name).expanduser().is_dir():
            return Reference(folder=Path(name).expanduser())
    run, at, step = name.partition("@")
    study, _, run = run.partition("/")
    if not run or "/" in run or study not in store.studies():
        known = ", ".join(store.studies()) or "none"
        raise ModelFolderError(f"{name!r} is neither a folder nor STUDY/RUN in {store.root}; studies there: {known}")
    key = find_run(store, study, run)
    if at:
        return Reference(study=study, key=key, step=_find_step(store, study, key, step))
    state = store.run(study, key).state
    if state is not RunState.FINISHED:
        raise ModelFolderError(
            f"{study}/{key} is {state}: only a finished run has a model; a checkpoint of it is {study}/{key}@{LATEST}"
        )
    return Reference(study=study, key=key)


def find_run(store: RunStore, study: str, name: str) -> str:
    """The key of a run from its key, the beginning of its key, or its label.

    Raises:
        ModelFolderError: no run or several are called so; the message lists the study's runs.
    """
    views = list(store.runs(study))
    found = [run.key for run in views if run.key == name] or [
        run.key for run in views if run.key.startswith(name) or run.label == name
    ]
    if len(found) == 1:
        return found[0]
    listed = "\n".join(f"  {study}/{run.key}   {run.label} ({run.state})" for run in views)
    how = "several runs match" if found else "no run is called"
    raise ModelFolderError(f"{how} {name!r} in study {study}; available:\n{listed}")


def _find_step(store: RunStore, study: str, key: str, step: str) -> int:
    """The step of a complete checkpoint; of the newest intact one for ``latest``."""
    checkpoints = Checkpoints(store, study, key)
    there = sorted(checkpoints.complete())
    listed = f"{study}/{key} has checkpoints of steps {', '.join(map(str, there))}"
    if not there:
        raise ModelFolderError(f"{study}/{key} has no checkpoint yet, or no longer")
    if step == LATEST:
        try:
            saved, _ = checkpoints.newest()
        except (CheckpointError, OSError) as error:
            raise ModelFolderError(f"no checkpoint of {study}/{key} can be loaded: {error}") from error
        assert saved is not None, "there are complete ones"
        return int(saved.progress["step"])
    if not step.isdecimal() or int(step) not in there:
        raise ModelFolderError(f"{study}/{key}@{step}: name a step of its checkpoints, or {LATEST}; {listed}")
    return int(step)


@contextmanager
def model_folder(reference: Reference, store: RunStore) -> Iterator[Path]:
    """The folder of a model, for ``models.load_model``.

    A checkpoint, and a model on another filesystem, are put into a temporary folder, which is gone afterwards.

    Raises:
        ModelFolderError: a checkpoint is damaged or foreign, or its tokenizer is not on this machine.
    """
    study, key = reference.study, reference.key
    if reference.folder is not None:
        yield reference.folder
    elif reference.step is None and "file" in store.fs.protocol:
        yield store.local_path(study, key, "model")
    else:
        with tempfile.TemporaryDirectory() as folder:
            if reference.step is None:
                _fetch(store, study, key, Path(folder))
            else:
                _write_checkpoint(store, study, key, reference.step, Path(folder))
            yield Path(folder)


def _fetch(store: RunStore, study: str, key: str, folder: Path) -> None:
    for file in (*FILES, TOKENIZER_CONFIG):
        source = store.path(study, key, "model", file)
        if store.fs.exists(source):
            store.fs.get_file(source, str(folder / file))


def _write_checkpoint(store: RunStore, study: str, key: str, step: int, folder: Path) -> None:
    """Write a training checkpoint as a finished run's model would be: its weights in the precision of the run."""
    view = store.run(study, key)
    run = RunConfig.from_identity(current_identity(view.record) or view.spec["identity"]).resolved()
    about, tokenizer = store.study(study)["corpus"], _tokenizer(store, study, key)
    end_of_text = Tokenizer.from_str(tokenizer).token_to_id(recorded_end_of_text(about) or END_OF_TEXT)
    config = run.model_config(int(about["vocab_size"]), end_of_text)
    dtype = DTYPES[run.precision]
    with torch.device("meta"):
        model = METHODS[config.method].model(config)
    try:
        saved = Checkpoints(store, study, key).open(step)
        weights = {
            name: saved.read(WEIGHT, name, 0, parameter.numel()).view(parameter.shape).to(dtype)
            for name, parameter in model.named_parameters()
        }
    except (CheckpointError, OSError) as error:
        raise ModelFolderError(
            f"the checkpoint of step {step} of {study}/{key} cannot be loaded: {error}; name another one, or {LATEST}"
        ) from error
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    if name := recorded_end_of_text(about):
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(end_of_text_config(name)), encoding="utf-8")


def _tokenizer(store: RunStore, study: str, key: str) -> str:
    exported = store.path(study, key, "model", "tokenizer.json")
    if store.fs.exists(exported):
        return bytes(store.fs.cat_file(exported)).decode("utf-8")
    prepared = own_corpus(store, study, key) / "tokenizer.json"
    if not prepared.is_file():
        raise ModelFolderError(
            f"{study}/{key} is not finished, and its tokenizer is not on this machine ({prepared}): load its checkpoint"
            " where the study runs, or with its HALTSCALE_HOME"
        )
    return prepared.read_text(encoding="utf-8")


def own_corpus(store: RunStore, study: str, key: str) -> Path:
    """The folder of the corpus that a run was trained on, on this machine; fetched from where :func:`own_corpus_place`
    says."""
    place = own_corpus_place(store, study, key)
    return SharedFolder(place).fetch() if is_url(place) else Path(place)


def own_corpus_place(store: RunStore, study: str, key: str) -> str:
    """The place of the corpus that a run was trained on, as the study prepared it: a folder of this machine, or a URL
    where ``HALTSCALE_CORPORA`` names one."""
    try:
        about, identity = store.study(study)["corpus"], store.run(study, key).spec["identity"]
        root = shared_root() or str(haltscale_home() / "corpora")
        return f"{root}/{about['name']}-{about['fingerprint']}-{identity['context']}"
    except KeyError as error:
        told = f"{study}/{key}: its documents do not say which corpus it was trained on (no {error})"
        raise ModelFolderError(f"{told}; name one with --corpus") from error


def figures(reference: Reference, store: RunStore) -> Mapping[str, Any]:
    """What is known of a model, for its card: the run's record, or of a checkpoint what the run was when it was saved.

    Empty for a folder.
    """
    if reference.folder is not None:
        return {}
    view = store.run(reference.study, reference.key)
    if reference.step is None:
        return view.record
    rows = store.read_lines(store.path(reference.study, reference.key, "evaluations.jsonl"))
    read = next((row for row in rows if row.get("step") == reference.step), {})
    return {**view.spec, **read, "step": reference.step}
