"""The model that a run starts from, as its identity has it. `llama.py` makes one from a folder or a hub name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from haltscale.model import Shape

IMPORTED = "imported"
"""The size of a run that has the shape of the model that it starts from."""


class InitialModelError(ValueError):
    """A run cannot start from a model; the message lists everything that does not fit."""


@dataclass(frozen=True, kw_only=True)
class InitialModel:
    """A Llama that a run starts from; see :func:`llama`. All of it is part of the run's identity."""

    source: str
    """Where it is: an absolute path, or a name on the Hugging Face Hub."""
    sha256: str
    """Of its weights."""
    tokenizer_sha256: str
    """Of its tokenizer; see :func:`tokenizer_digest`."""
    shape: Shape
    vocab_size: int
    context: int
    """Longest text that it was made for, in tokens."""
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> InitialModel:
        """From a run's identity."""
        return cls(**{**identity, "shape": Shape(**identity["shape"])})
