"""Checkpoints: resumed to the last bit, by any number of ranks, and never from a file that is not what was written."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from haltscale.model import Parametrisation, build_model
from haltscale.platform import checkpoints as checkpoint_module
from haltscale.platform.checkpoints import CheckpointError, Checkpoints, Saved, Shard
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.store import RunStore
from haltscale.platform.training.engine import full_weights, snapshot, start
from haltscale.platform.training.monitors import RunMemoryError, memory_explained
from haltscale.platform.training.progress import Progress

from looping import LARGE, RUNS, Listener, batches, engine_of, execution_of, go, timeless


def opened(store: RunStore, key: str = "run") -> Checkpoints:
    return Checkpoints(store, "study", key)


def begin(run: RunConfig, checkpoints: Checkpoints, *, vocabulary: int = LARGE, **changes: Any) -> tuple[Any, Progress]:
    model = build_model(run.model_config(vocabulary), seed=run.seed)
    return start(model, run, execution_of(run, **changes), checkpoints)


def trained(
    run: RunConfig, checkpoints: Checkpoints, *, vocabulary: int = LARGE, **changes: Any
) -> tuple[Any, Listener]:
    """A whole run that saves after steps 3 and 6."""
    engine, listener = engine_of(run, vocabulary=vocabulary, **changes), Listener()
    listener.at_checkpoint = lambda progress: checkpoints.write(snapshot(engine), progress.to_dict())
    go(engine, run, batches(run), listener=listener, checkpoints=2, **changes)
    checkpoints.wait()
    return engine, listener


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", ["adaptive", "muon"])
def test_a_resumed_run_is_the_uninterrupted_run(case, zero_stage, precision, store):
    """To the last bit: a run that was killed has the same place in a study as one that was not."""
    run = replace(RUNS[case], precision=precision)
    checkpoints = opened(store)
    engine, listener = trained(run, checkpoints, zero_stage=zero_stage)
    assert list(checkpoints.complete()) == [3, 6]
    shutil.rmtree(store.path("study", "run", "checkpoints", "step-00000006"))

    other_start = replace(run, seed=run.seed + 1)  # all that counts comes from the checkpoint
    second, progress = begin(other_start, opened(store), zero_stage=zero_stage)
    assert progress.step == 3
    resumed, later = go(second, run, batches(run, 3), progress, checkpoints=2)
    assert timeless(later.rows) == timeless(listener.rows[3:])
    assert resumed.sequence_digest
    for (name, mine), theirs in zip(full_weights(second).items(), full_weights(engine).values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(("first", "then"), [(0, 1), (1, 3), (3, 2), (2, 0)])
@pytest.mark.parametrize("case", ["adaptive", "muon"])
def test_a_run_goes_on_at_another_zero_stage(case, first, then, store):
    run = RUNS[case]
    _, listener = trained(run, opened(store), zero_stage=first)
    shutil.rmtree(store.path("study", "run", "checkpoints", "step-00000006"))
    engine, progress = begin(run, opened(store), zero_stage=then)
    _, later = go(engine, run, batches(run, 3), progress)
    losses = [row["loss"] for row in later.rows]
    assert losses == pytest.approx([row["loss"] for row in listener.rows[3:]], rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_each_weights_own_rate_outlives_a_resumption(zero_stage, store):
    """Under CompleteP weights have rates, epsilons and decays of their own: to the last bit again."""
    run = replace(RUNS["adaptive"], size="3x96", parametrisation=Parametrisation.COMPLETEP, learning_rate=1e-2)
    engine, listener = trained(run, opened(store), zero_stage=zero_stage)
    shutil.rmtree(store.path("study", "run", "checkpoints", "step-00000006"))
    second, progress = begin(replace(run, seed=run.seed + 1), opened(store), zero_stage=zero_stage)
    _, later = go(second, run, batches(run, 3), progress, checkpoints=2)
    assert timeless(later.rows) == timeless(listener.rows[3:])
    for (name, mine), theirs in zip(full_weights(second).items(), full_weights(engine).values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_new_run_begins_at_its_beginning(store):
    _, progress = begin(RUNS["vanilla"], opened(store))
    assert progress == Progress()


# ---- what is on disk ------------------------------------------------------------------------------------------------


def shard(value: float) -> Shard:
    return Shard(
        tensors={"weight:0:w": torch.full((4,), float(value))}, counters={"optimizer_step": 1, "loss_scaler": {}}
    )


@pytest.fixture(params=["local", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunStore]:
    yield RunStore(tmp_path / "runs" if request.param == "local" else "memory://checkpoints")
    fsspec.filesystem("memory").store.clear()


def written(store: RunStore, *steps: int) -> Checkpoints:
    checkpoints = opened(store)
    for step in steps:
        checkpoints.write(shard(step), Progress(step=step).to_dict())
    checkpoints.wait()
    return checkpoints


def test_the_newest_is_opened(any_store):
    saved, damage = written(any_store, 2, 10, 9).newest()
    assert saved is not None
    assert (saved.progress["step"], damage) == (10, [])
    assert saved.read("weight", "w", 1, 2).tolist() == [10.0, 10.0]


def test_elements_that_were_not_saved_are_refused(store):
    saved, _ = written(store, 1).newest()
    assert saved is not None
    for place in (("weight", "w", 2, 3), ("weight", "v", 0, 1), ("exp_avg", "w", 0, 4)):
        with pytest.raises(CheckpointError, match="has no elements"):
            saved.read(*place)


def test_the_policy_keeps_the_newest_and_what_is_named(any_store):
    checkpoints = written(any_store, 1, 2, 3, 4, 5)
    checkpoints.prune({2}, keep_last=2)
    assert list(checkpoints.complete()) == [2, 4, 5]
    checkpoints.prune(set(), keep_last=1)
    assert list(checkpoints.complete()) == [5]


def test_an_incomplete_checkpoint_does_not_count(store):
    checkpoints = written(store, 1, 2, 3)
    folder = Path(store.path("study", "run", "checkpoints", "step-00000003"))
    (folder / "shard-00000-of-00001.json").rename(folder / "shard-00000-of-00002.json")  # the second never came
    saved, _ = checkpoints.newest()
    assert saved is not None
    assert saved.progress["step"] == 2
    written(store, 4).prune(set(), keep_last=1)
    assert not folder.exists()


def files(store: RunStore, step: int) -> tuple[Path, Path]:
    folder = Path(store.path("study", "run", "checkpoints", f"step-{step:08d}"))
    return folder / "shard-00000-of-00001.safetensors", folder / "shard-00000-of-00001.json"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9])


@pytest.mark.parametrize("which", [0, 1], ids=["tensors", "manifest"])
@pytest.mark.parametrize(
    "harm", [lambda p: flip(p, -3), lambda p: flip(p, 20), lambda p: p.write_bytes(p.read_bytes()[:9])]
)
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_it_taken(store, which, harm: Callable[[Path], None]):
    written(store, 1, 2)
    harm(files(store, 2)[which])
    saved, damage = opened(store).newest()
    assert saved is not None
    assert saved.progress["step"] == 1
    assert "step 2 is damaged" in damage[0]
    harm(files(store, 1)[which])
    with pytest.raises(CheckpointError, match=r"intact.*step 2.*step 1.*remove the folder to start again"):
        opened(store).newest()


def test_the_run_says_that_it_went_on_from_an_earlier_one(store):
    run = RUNS["vanilla"]
    trained(run, opened(store))
    flip(files(store, 6)[0], -3)
    _, progress = begin(run, opened(store))
    (event,) = progress.events
    assert event["step"] == 3
    assert "step 6 is damaged" in event["what"]
    assert "resumed from step 3" in event["what"]


def rewrite(manifest: Path, **changes: Any) -> None:
    from haltscale.platform.checkpoints import _digest

    document = json.loads(manifest.read_text()) | changes
    document.pop("digest")
    manifest.write_text(json.dumps({**document, "digest": _digest(document)}))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def holding(path: Path, **tensors: torch.Tensor) -> None:
    """Other tensors, rehashed by one who knows how."""
    save_file({name.replace("_", ":"): tensor for name, tensor in tensors.items()}, path)
    rewrite(path.with_suffix(".json"), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


HOSTILE: dict[str, Callable[[Path, Path], object]] = {
    "a manifest that is a list": lambda tensors, manifest: manifest.write_text("[1, 2]"),
    "a manifest that is a number": lambda tensors, manifest: manifest.write_text("7"),
    "a manifest that is a folder": lambda tensors, manifest: a_folder(manifest),
    "a manifest that is nested deep": lambda tensors, manifest: manifest.write_text("[" * 100_000),
    "a manifest of no UTF-8": lambda tensors, manifest: manifest.write_bytes(b"\xff\xfe"),
    "a shard that is a folder": lambda tensors, manifest: a_folder(tensors),
    "no shard": lambda tensors, manifest: tensors.unlink(),
    "a shard that is no safetensors": lambda tensors, manifest: (
        tensors.write_bytes(b"x" * 99),
        rewrite(manifest, sha256=hashlib.sha256(b"x" * 99).hexdigest()),
    ),
    "NaN weights": lambda tensors, manifest: holding(tensors, weight_0_w=torch.tensor([1.0, math.nan, 1.0, 1.0])),
    "infinite weights": lambda tensors, manifest: holding(tensors, weight_0_w=torch.full((4,), math.inf)),
    "other names": lambda tensors, manifest: holding(tensors, w=torch.ones(4)),
    "another dtype": lambda tensors, manifest: holding(tensors, weight_0_w=torch.ones(4, dtype=torch.int64)),
    **{
        f"step {step!r}": lambda tensors, manifest, step=step: rewrite(manifest, progress=Progress(step=step).to_dict())
        for step in (10**30, 3, -1, True, 2.0, None, "../../x")
    },
    "tokens below zero": lambda tensors, manifest: rewrite(manifest, progress=Progress(step=2, tokens=-1).to_dict()),
    "seconds below zero": lambda tensors, manifest: rewrite(
        manifest, progress=Progress(step=2, seconds=-0.5).to_dict()
    ),
    "progress that is a list": lambda tensors, manifest: rewrite(manifest, progress=[2]),
    "no counters": lambda tensors, manifest: rewrite(manifest, counters={}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_implausible_checkpoint_is_found_out_and_the_one_before_it_taken(name, store):
    written(store, 1, 2)
    HOSTILE[name](*files(store, 2))
    saved, (damage,) = opened(store).newest()
    assert saved is not None
    assert saved.progress["step"] == 1
    assert "the checkpoint of step 2 is damaged (shard-00000-of-00001" in damage


def test_each_rank_verifies_its_part(tmp_path, monkeypatch):
    """Three shards on two ranks: together each is read once, so that what one rank finds, another need not."""
    read: list[tuple[int, str]] = []
    monkeypatch.setattr(checkpoint_module, "_sha256", lambda path: read.append((rank, path.name)) or "")
    document = {"attempt": "a", "sha256": "", "progress": {"step": 1}, "counters": {}}
    saved = object.__new__(Saved)
    saved.manifests, saved._files = [document] * 3, [tmp_path / f"{n}.safetensors" for n in range(3)]
    for file in saved._files:
        save_file({"weight:0:w": torch.ones(2)}, file)
    for rank in range(2):
        saved.verify(rank=rank, world=2)
    assert read == [(0, "0.safetensors"), (0, "2.safetensors"), (1, "1.safetensors")]


def test_another_schema_version_is_refused(store):
    written(store, 1, 2)
    rewrite(files(store, 2)[1], schema=99)
    with pytest.raises(CheckpointError, match="schema 99, this haltscale reads 1"):
        opened(store).newest()


def test_another_runs_checkpoint_is_refused(store):
    written(store, 1)
    shutil.move(store.path("study", "run"), store.path("study", "other"))
    with pytest.raises(CheckpointError, match="belongs to run run, not to other"):
        opened(store, "other").newest()


def test_another_models_checkpoint_is_refused(store):
    trained(RUNS["vanilla"], opened(store))
    with pytest.raises(CheckpointError, match="has no elements"):
        begin(RUNS["vanilla"], opened(store), vocabulary=LARGE + 1)


def test_nothing_in_a_checkpoint_is_a_pickle(store):
    trained(RUNS["vanilla"], opened(store))
    content = [path for path in Path(store.path("study", "run", "checkpoints")).rglob("*") if path.is_file()]
    assert {path.suffix for path in content} == {".safetensors", ".json"}


# ---- a disk that does not take it -----------------------------------------------------------------------------------


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """The kernel refuses files above this many bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_what_was_there(store):
    checkpoints = written(store, 1)
    before = {path: path.read_bytes() for path in files(store, 1)}
    with small_files(64):
        checkpoints.write(shard(2), Progress(step=2).to_dict())
        with pytest.raises(CheckpointError, match=r"step 2 could not be written.*untouched: 1"):
            checkpoints.wait()
    assert {path: path.read_bytes() for path in files(store, 1)} == before
    assert list(checkpoints.complete()) == [1]
    assert not list(files(store, 2)[0].parent.iterdir()), "no debris is left on the full disk"
    checkpoints.write(shard(3), Progress(step=3).to_dict())  # there is room again
    checkpoints.wait()
    assert list(checkpoints.complete()) == [1, 3]


def test_a_store_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match=r"step 1 could not be written.*untouched: none"):
        written(RunStore(tmp_path / "runs"), 1)


def test_out_of_memory_is_told_and_leaves_what_was_there(store):
    """The allocator itself refuses, in the middle of the fifth step."""
    run, checkpoints, listener = RUNS["adaptive"], opened(store), Listener()
    engine = engine_of(run, vocabulary=LARGE)
    listener.at_checkpoint = lambda progress: checkpoints.write(snapshot(engine), progress.to_dict())
    calls = iter(range(99))

    def greedy(*_: Any) -> None:
        torch.empty(2**60 if next(calls) == 4 else 1)

    engine.module.register_forward_hook(greedy)
    execution = execution_of(run, checkpoints=2)
    advice = r"micro_batch_sequences below 8.*activation_checkpointing"
    with pytest.raises(RunMemoryError, match=advice), memory_explained(execution):
        go(engine, run, batches(run), listener=listener, checkpoints=2)
    checkpoints.wait()
    _, progress = begin(run, opened(store))
    assert progress.step == 3


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), memory_explained(execution_of(RUNS["vanilla"])):
        raise RuntimeError("shapes differ")
