"""Training checkpoints: sharded by rank, hashed, and made of nothing that could execute.

    <run>/checkpoints/step-00000012/
        shard-00000-of-00002.safetensors   fragments of float32 weights and moments that rank 0 steps
        shard-00000-of-00002.json          its manifest, written last: hash, progress, counters

A step's checkpoint is complete when every shard has its manifest, so nothing has to be committed. Fragments carry the
name of their parameter and their place in it: any number of ranks, at any ZeRO stage, can read them again.

What the hashes hold: a file that was damaged or cut short is found out. They are not signatures: whoever can write to
the store can write another checkpoint. It can change numbers then, but run no code: nothing here is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import tempfile
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from haltscale.platform.durable import sync_file, sync_folder
from haltscale.platform.identity import canonical_json
from haltscale.platform.store import RunStore

log = logging.getLogger(__name__)

CHECKPOINT_SCHEMA = 1
WEIGHT, ADAM_MOMENTS, MUON_MOMENTS = "weight", ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
MOMENTS = ADAM_MOMENTS + MUON_MOMENTS
_MANIFEST = re.compile(r"shard-(\d{5})-of-(\d{5})\.json")
_STEP = re.compile(r"step-(\d{8})")
_ENTRY = re.compile(r"\w+:\d+:.")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which, why, and which others exist."""


class DamagedError(CheckpointError):
    """A checkpoint's files are not what its manifest says."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one rank saves."""

    tensors: Mapping[str, torch.Tensor]
    """Fragments by :func:`tensor_name`, flat, float32, on the CPU."""
    counters: Mapping[str, Any]
    """The optimizer's: ``optimizer_step``, and the loss scaler's under fp16."""


def tensor_name(kind: str, parameter: str, start: int) -> str:
    """The name of a fragment that begins at element ``start`` of a flattened parameter."""
    return f"{kind}:{start}:{parameter}"


class Saved:
    """A complete checkpoint; its manifests are verified when it is opened, its tensors by :meth:`verify`.

    Raises:
        DamagedError: a manifest is missing, cut short, changed or implausible.
        CheckpointError: it was written by another version or for another run.
    """

    def __init__(self, folder: Path, step: int, world: int, key: str, holding: object = None) -> None:
        self._holding = holding  # a temporary folder lives as long as the files in it are mapped
        names = [f"shard-{rank:05d}-of-{world:05d}" for rank in range(world)]
        self.manifests = [_read_manifest(folder / f"{name}.json", step, key) for name in names]
        self._files = [folder / f"{name}.safetensors" for name in names]
        if len({manifest["attempt"] for manifest in self.manifests}) > 1:
            raise DamagedError("its shards were written by different attempts")

    def verify(self, *, rank: int = 0, world: int = 1) -> None:
        """Read the shards that fall to a rank, each to one, and compare them with the manifest.

        Raises:
            DamagedError: a file is missing, cut short or changed, or holds numbers that no training leaves behind.
        """
        for file, manifest in list(zip(self._files, self.manifests, strict=True))[rank::world]:
            try:
                if _sha256(file) != manifest["sha256"]:
                    raise DamagedError(f"{file.name} does not match its manifest: the hash differs")
                with safe_open(file, framework="pt") as tensors:
                    for entry in tensors.keys():  # noqa: SIM118 (no mapping)
                        tensor = tensors.get_tensor(entry)
                        if not _ENTRY.match(entry) or tensor.dtype is not torch.float32 or tensor.ndim != 1:
                            raise DamagedError(f"{file.name} contains {entry!r}, which is not an entry of a checkpoint")
                        if not torch.isfinite(tensor).all():
                            raise DamagedError(f"{file.name} contains numbers that are not finite in {entry}")
            except FileNotFoundError:
                raise DamagedError(f"{file.name} is missing") from None
            except (OSError, SafetensorError) as error:
                raise DamagedError(f"{file.name} cannot be read: {error}") from None

    @property
    def progress(self) -> Mapping[str, Any]:
        """Fields of :class:`haltscale.platform.training.loop.Progress`, as rank 0 counted them."""
        fields: Mapping[str, Any] = self.manifests[0]["progress"]
        return fields

    @property
    def counters(self) -> Mapping[str, Any]:
        """See :class:`Shard`."""
        counters: Mapping[str, Any] = self.manifests[0]["counters"]
        return counters

    @cached_property
    def _index(self) -> dict[tuple[str, str], list[tuple[int, Any]]]:
        index: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for path in self._files:
            file = safe_open(path, framework="pt")
            for entry in file.keys():  # noqa: SIM118 (no mapping)
                kind, start, name = entry.split(":", 2)
                index.setdefault((kind, name), []).append((int(start), file.get_slice(entry)))
        return {where: sorted(found, key=lambda fragment: fragment[0]) for where, found in index.items()}

    def read(self, kind: str, parameter: str, start: int, numel: int) -> torch.Tensor:
        """Elements ``start .. start + numel - 1`` of a flattened parameter (or of its moment), float32.

        Raises:
            CheckpointError: the checkpoint does not hold them: it is of another model.
        """
        pieces, at = [], start
        for begin, fragment in self._index.get((kind, parameter), []):
            end = begin + fragment.get_shape()[0]
            if begin <= at < min(end, start + numel):
                pieces.append(fragment[at - begin : min(end, start + numel) - begin])
                at = min(end, start + numel)
        if at != start + numel:
            raise CheckpointError(f"the checkpoint has no elements {at} to {start + numel} of {kind} {parameter}")
        return torch.cat(pieces) if pieces else torch.empty(0)

    @torch.no_grad()
    def load_weights(self, model: torch.nn.Module) -> None:
        """Put the saved weights into a model that DeepSpeed has not wrapped yet."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.read(WEIGHT, name, 0, parameter.numel()).view_as(parameter))


class Checkpoints:
    """The checkpoints of one run, seen from one rank."""

    def __init__(self, store: RunStore, study: str, key: str, *, rank: int = 0, world: int = 1) -> None:
        attempt = [uuid.uuid4().hex]  # shards of one checkpoint must be of one attempt
        if world > 1:
            dist.broadcast_object_list(attempt, src=0)
        self._fs, self._folder, self._key = store.fs, store.path(study, key, "checkpoints"), key
        self._local = "file" in store.fs.protocol
        self._rank, self._world, self._attempt = rank, world, attempt[0]
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    # ---- writing --------------------------------------------------------------------------------------------------

    def write(self, shard: Shard, progress: Mapping[str, Any]) -> None:
        """Write this rank's shard from a thread, after the one before it is on disk.

        Raises:
            CheckpointError: the one before it could not be written.
        """
        self.wait()
        self._writing = self._writer.submit(self._write, shard, dict(progress))

    def wait(self) -> None:
        """Until what was begun is on disk.

        Raises:
            CheckpointError: it could not be written; what was there before is as it was.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, shard: Shard, progress: dict[str, Any]) -> None:
        step = progress["step"]
        folder, name = self._step_folder(step), f"shard-{self._rank:05d}-of-{self._world:05d}"
        try:
            self._fs.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder if self._local else None, prefix=".partial-") as partial:
                tensors, manifest = Path(partial) / f"{name}.safetensors", Path(partial) / f"{name}.json"
                save_file(dict(shard.tensors), tensors)
                document = {
                    "schema": CHECKPOINT_SCHEMA,
                    "key": self._key,
                    "attempt": self._attempt,
                    "sha256": _sha256(tensors),
                    "counters": dict(shard.counters),
                    "progress": progress,
                }
                manifest.write_text(json.dumps({**document, "digest": _digest(document)}, indent=1))
                for file in (tensors, manifest):  # the manifest last: it says that the rest is there
                    self._publish(file, f"{folder}/{file.name}")
        except (OSError, SafetensorError) as error:
            there = ", ".join(map(str, sorted(self.complete()))) or "none"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {folder}: {error};"
                f" checkpoints of earlier steps are untouched: {there}"
            ) from error

    def _publish(self, file: Path, target: str) -> None:
        if not self._local:
            self._fs.put_file(str(file), target)
            return
        sync_file(file)
        file.replace(target)
        sync_folder(Path(target).parent)

    def prune(self, keep: set[int], keep_last: int) -> None:
        """Remove, on rank 0, all but the newest ``keep_last`` complete checkpoints and the steps in ``keep``.

        Incomplete ones older than the newest complete one go too.
        """
        complete = sorted(self.complete())
        if self._rank != 0 or not complete:
            return
        kept = keep | set(complete[-keep_last:])
        for step in self._steps():
            if step not in kept and step < complete[-1]:
                self._fs.rm(self._step_folder(step), recursive=True)

    # ---- reading --------------------------------------------------------------------------------------------------

    def complete(self) -> dict[int, int]:
        """Steps that have a complete checkpoint, and by how many ranks it was written."""
        return {step: world for step in self._steps() if (world := self._world_of(step))}

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest intact checkpoint, the same on all ranks, and what was found wrong with newer ones.

        Each rank verifies its part of the shards, and all hear what the others found.

        Raises:
            CheckpointError: there are checkpoints but none is intact, or they are of another version or another run.
        """
        steps: list[int] = self._agreed(sorted(self.complete(), reverse=True))[0]
        damage: list[str] = []
        for step in steps:
            saved: Saved | None = None
            verdict: tuple[str, bool] | None = None
            try:
                saved = self.open(step, verify=False)
                saved.verify(rank=self._rank, world=self._world)
            except CheckpointError as error:
                verdict = str(error), isinstance(error, DamagedError)
            found = next((each for each in self._agreed(verdict) if each), None)
            if found is None:
                return saved, damage
            what, damaged = found
            if not damaged:
                raise CheckpointError(what)
            damage.append(f"the checkpoint of step {step} is damaged ({what})")
            if self._rank == 0:
                log.warning("%s: %s; looking for an earlier one", self._key, damage[-1])
        if damage:
            raise CheckpointError(
                f"no checkpoint in {self._folder} is intact: {'; '.join(damage)}; remove the folder to start again"
            )
        return None, damage

    def _agreed(self, mine: Any) -> list[Any]:
        """What every rank has to say, by rank."""
        every = [mine] * self._world
        if self._world > 1:
            dist.all_gather_object(every, mine)
        return every

    def open(self, step: int, *, verify: bool = True) -> Saved:
        """A complete checkpoint; see :class:`Saved`.

        Args:
            verify: read all of it first; False where that was done.
        """
        folder, world = self._step_folder(step), self._world_of(step)
        if world is None:
            raise DamagedError(f"{folder} is not complete")
        if self._local:
            saved = Saved(Path(folder), step, world, self._key)
        else:
            fetched = tempfile.TemporaryDirectory(prefix="checkpoint-")
            for path in self._fs.ls(folder, detail=False):
                self._fs.get_file(path, str(Path(fetched.name) / path.rsplit("/", 1)[-1]))
            saved = Saved(Path(fetched.name), step, world, self._key, holding=fetched)
        if verify:
            saved.verify()
        return saved

    def _step_folder(self, step: int) -> str:
        return f"{self._folder}/step-{step:08d}"

    def _names(self, folder: str) -> list[str]:
        try:
            self._fs.invalidate_cache(folder)  # other ranks and other nodes write here
            return [path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(folder, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _steps(self) -> list[int]:
        return sorted(int(found[1]) for name in self._names(self._folder) if (found := _STEP.fullmatch(name)))

    def _world_of(self, step: int) -> int | None:
        shards: dict[int, set[int]] = {}
        for name in self._names(self._step_folder(step)):
            if found := _MANIFEST.fullmatch(name):
                shards.setdefault(int(found[2]), set()).add(int(found[1]))
        return next((world for world, ranks in sorted(shards.items()) if ranks == set(range(world))), None)


def _read_manifest(path: Path, step: int, key: str) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        digest = document.pop("digest")
        intact = digest == _digest(document)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedError(f"{path.name} cannot be read") from None
    if not intact:
        raise DamagedError(f"{path.name} is damaged: its digest differs")
    if document.get("schema") != CHECKPOINT_SCHEMA:
        raise CheckpointError(
            f"{path} has checkpoint schema {document.get('schema')}, this haltscale reads {CHECKPOINT_SCHEMA}:"
            " finish the run with the haltscale that began it, or remove its checkpoints"
        )
    if document.get("key") != key:
        raise CheckpointError(f"{path} belongs to run {document.get('key')}, not to {key}")
    if problem := _implausible(document, step):
        raise DamagedError(f"{path.name} contains {problem}")
    return document


def _implausible(document: Mapping[str, Any], step: int) -> str:
    """What a manifest says that no training wrote; empty if all of it may be true."""
    for name, kind in (("attempt", str), ("sha256", str), ("counters", dict), ("progress", dict)):
        if not isinstance(document.get(name), kind):
            return f"{name} {document.get(name)!r}"
    recorded = document["progress"].get("step")
    if type(recorded) is not int or recorded != step:
        return f"step {recorded!r} in the folder of step {step}"
    for part in ("progress", "counters"):
        for name, value in document[part].items():
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                return f"{name} {value!r}"
    if type(document["counters"].get("optimizer_step")) is not int:
        return f"optimizer_step {document['counters'].get('optimizer_step')!r}"
    if not isinstance(document["counters"].get("loss_scaler"), dict):
        return f"loss_scaler {document['counters'].get('loss_scaler')!r}"
    return ""


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
