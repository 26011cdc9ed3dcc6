"""A home folder of its own for every test, a small corpus, and a store with runs in every state."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from haltscale.model import METHODS, AdaptiveOptions, LanguageModel, Method, ModelConfig, Shape, build_model
from haltscale.platform import lease
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.corpora.corpus import Corpus
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import BytePairs
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps.study import Study
from haltscale.platform.sweeps.sweep import grid

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``$HALTSCALE_HOME`` of this test alone; nothing of the user's environment points elsewhere."""
    for name in ("HALTSCALE_STORE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "HALTSCALE_GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


WORDS = ("the", "state", "of", "union", "is", "strong", "and", "we", "shall", "ask", "congress", "peace", "law", "work")


def sentence(seed: int, words: int) -> str:
    stream = random.Random(seed)
    return " ".join(stream.choice(WORDS) for _ in range(words))


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A folder with six documents, one of them in a folder below."""
    folder = tmp_path / "texts"
    for index in range(6):
        path = folder / ("below" if index == 3 else "") / f"document-{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sentence(index, 40 + 7 * index), encoding="utf-8")
    return folder


@pytest.fixture
def corpus(documents: Path) -> Callable[..., Corpus]:
    """Builds a corpus over the folder ``documents``, or over another; ``source``: fields of its source."""

    def build(
        *, folder: str | Path = documents, vocab_size: int = 300, source: dict[str, Any] | None = None, **changes: Any
    ) -> Corpus:
        values: dict[str, Any] = {"name": "tiny", "validation_documents": 2}
        values["sources"] = {"texts": Source(path=str(folder), **(source or {}))}
        values["tokenizer"] = BytePairs(vocab_size=vocab_size)
        return Corpus(**(values | changes))

    return build


@pytest.fixture
def base() -> RunConfig:
    """A run small enough to train in a test."""
    return RunConfig(size="0.6m", tokens=16 * 64, context=16, batch_tokens=64, precision=Precision.FP32)


@pytest.fixture
def study(corpus: Callable[..., Corpus], base: RunConfig) -> Callable[..., Study]:
    """Builds a study of three runs over the small corpus."""

    def build(**changes: Any) -> Study:
        sweep = grid(method=Method.ADAPTIVE, lam=[0.1, 0.5], l_max=2) + grid(method=Method.VANILLA)
        values: dict[str, Any] = {
            "name": "tiny-study",
            "question": "Does it think?",
            "corpus": corpus(),
            "base": base,
            "sweep": sweep,
        }
        return Study(**(values | changes))

    return build


class Author:
    """Writes runs of a study in any state, through the store's own writing side. Generated numbers."""

    def __init__(self, store: RunStore) -> None:
        self.store = store

    def plan(self, study: str, keys: list[str], **more: Any) -> None:
        document = {"name": study, "question": "?", "note": "", "corpus": {}, "runs": keys, **more}
        self.store.write_json(self.store.path(study, None, "study.json"), document)

    def spec(self, study: str, key: str, label: str, **identity: Any) -> None:
        document = {"label": label, "study": study, "key": key, "identity": identity, "execution": {}}
        self.store.write_json(self.store.path(study, key, "spec.json"), document)

    def status(self, study: str, key: str, state: str, *, silent: float = 0.0, **more: Any) -> None:
        status = {"state": state, "step": 0, "steps": 10, "error": None} | more
        path = self.store.path(study, key, "status.json")
        self.store.write_json(path, status)
        if silent and self.store.is_local:
            os.utime(path, (time.time() - silent,) * 2)
        elif silent:  # no object's time can be set: its process is gone
            gone = {"process": {"machine": lease._machine(), "pid": 1 << 30, "start": "1"}}
            self.store.fs.pipe_file(self.store.path(study, key, ".lease", "000001.json"), json.dumps(gone).encode())

    def record(self, study: str, key: str, *, loss: float, **more: Any) -> None:
        record = {"key": key, "loss": loss, "mean_steps": 1.5, "wall_seconds": 12.4} | more
        self.store.write_json(self.store.path(study, key, "record.json"), record)

    def every_state(self, study: str = "quick") -> list[str]:
        """One run in every state; gives their keys in the study's order."""
        for key in ("finished", "running", "stalled", "failed"):
            options = {"lam": 0.5} if key != "finished" else {}
            method = "adaptive" if options else "vanilla"
            self.spec(study, key, f"{method} {key}", method=method, size="0.6m", seed=0, options=options)
        self.status(study, "finished", "finished", step=10)
        identity = {"method": "vanilla", "size": "0.6m", "seed": 0, "options": {}}
        self.record(study, "finished", loss=4.25, identity=identity, parameters_total=594_000)
        self.status(study, "running", "running", step=5, loss=4.5, mean_steps=2.0)
        self.status(study, "stalled", "running", step=2, silent=10_000)
        self.status(study, "failed", "failed", step=1, error="TrainingDivergedError: the loss is nan at step 1")
        keys = ["finished", "running", "stalled", "failed", "planned"]
        self.plan(study, keys)
        return keys


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def author(store: RunStore) -> Author:
    return Author(store)


def tiny_tokenizer(size: int, *, end: str = "<|endoftext|>") -> Tokenizer:
    """Bytes, then numbers up to the size; end-of-text is token 0."""
    made = Tokenizer(BPE({symbol: index for index, symbol in enumerate([end, *sorted(ByteLevel.alphabet())])}, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    made.add_special_tokens([end])
    made.add_tokens([f"[{index}]" for index in range(made.get_vocab_size(), size)])
    return made


def tiny_model(method: Method = Method.ADAPTIVE, *, vocab_size: int = 260, context: int = 64) -> LanguageModel:
    """A model of random weights, its router's included, so that halting is ragged; its logits are far apart."""
    options = (
        AdaptiveOptions(l_max=2, tau=0.25, router_bias=0.5) if method is Method.ADAPTIVE else METHODS[method].options()
    )
    shape = Shape(layers=3, d=16, heads=2, kv_heads=2, ffn=24)
    config = ModelConfig(method=method, shape=shape, vocab_size=vocab_size, context=context, options=options)
    model = build_model(config, seed=0)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name and name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=stream))
            if name == "head.weight":
                parameter.mul_(20)
    return model.eval()


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a finished model of a method."""

    def write(method: Method = Method.ADAPTIVE, folder: Path | None = None, **changes: Any) -> Path:
        folder = folder or tmp_path / f"finished-{method}"
        folder.mkdir(parents=True, exist_ok=True)
        model = tiny_model(method, **changes)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
        tiny_tokenizer(model.config.vocab_size).save(str(folder / "tokenizer.json"))
        return folder

    return write
