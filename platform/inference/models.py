"""Load a model from its folder: safetensors, config, tokenizer. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from haltscale.model import METHODS, LanguageModel, ModelConfig, config_from_dict, config_problems
from haltscale.platform.corpora.tokenization import TokenizerError, exact
from haltscale.platform.corpora.tokenization import encode as encode_texts

FILES = ("model.safetensors", "config.json", "tokenizer.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
"""Says which token is end-of-text, as the corpus named it, where `transformers` looks for it: ``eos_token``."""
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
"""What end-of-text may be called in a folder that does not say it; runs of older versions left such ones behind."""
EXPORTED_CONFIG = "haltscale"
"""Where an exported model's ``config.json`` (see :mod:`haltscale.platform.inference.export`) keeps the model's own."""
EXPORTED_PREFIX = "inner."
"""Stands before the names of an exported model's weights."""


class ModelFolderError(ValueError):
    """A folder does not hold a model that can be loaded; the message names the file, and what to do."""


class TextError(ValueError):
    """A text cannot be made into tokens; the message says why."""


def encode(tokenizer: Tokenizer, text: str, end_of_text: int | None = None) -> list[int]:
    """The tokens of a text, without end-of-text before it.

    Args:
        end_of_text: where its name is written in the text, that is text, as in training; None: it is the token.

    Raises:
        TextError: the text holds half a surrogate pair, or the tokenizer has no token for a part of it.
    """
    try:
        ids: list[int] = encode_texts(tokenizer, [text], end_of_text)[0].tolist()
    except TokenizerError as error:
        raise TextError(str(error)) from error
    return ids


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model, ready to read and to write."""

    model: LanguageModel
    """In evaluation mode."""
    tokenizer: Tokenizer
    """Makes exactly a text's tokens, as in training: see :func:`haltscale.platform.corpora.tokenization.exact`."""
    folder: Path
    end_of_text_name: str | None = None
    """As the corpus named it; None: the first of ``ENDS_OF_TEXT`` that the tokenizer has."""

    @property
    def end_of_text(self) -> int:
        """The token that stands before every document."""
        found = self.tokenizer.token_to_id(self.end_of_text_name or guessed_end_of_text(self.tokenizer))
        assert found is not None, "checked when it was loaded"
        return int(found)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts, as training encoded its documents: no text becomes end-of-text.

        Raises:
            TokenizerError: a text is no valid Unicode, or the tokenizer fails on it.
        """
        return [ids.tolist() for ids in encode_texts(self.tokenizer, list(texts), self.end_of_text)]


def guessed_end_of_text(tokenizer: Tokenizer) -> str:
    """The name of the end-of-text token of a folder that does not say it.

    Raises:
        ModelFolderError: the tokenizer has none.
    """
    for name in ENDS_OF_TEXT:
        if tokenizer.token_to_id(name) is not None:
            return name
    raise ModelFolderError(
        f"the tokenizer has no end-of-text token ({', '.join(ENDS_OF_TEXT)}): it is not this model's, or name the"
        f' token in {TOKENIZER_CONFIG}: {{"eos_token": ...}}'
    )


def end_of_text_config(name: str) -> dict[str, str]:
    """What ``tokenizer_config.json`` says of end-of-text, which begins a document and ends it."""
    return {"bos_token": name, "eos_token": name}


def load_model(folder: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> LoadedModel:
    """The model of a folder that a run or an export left behind, or that ``model_ref.model_folder`` gives.

    Args:
        dtype: of the weights; by default as they were saved, which is what the run was evaluated in.

    Raises:
        ModelFolderError: files are missing, damaged, foreign, or do not fit each other.
        DeviceError: there is no such device here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder; name a run as STUDY/RUN, or the folder of a finished model")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ModelFolderError(f"{folder} lacks {', '.join(missing)}{_instead(folder)}")
    config = _config(folder / "config.json")
    tokenizer, end_of_text = _tokenizer(folder / "tokenizer.json", config)
    with torch.device("meta"):  # no memory, and no initial values that would be thrown away
        model = METHODS[config.method].model(config)
    model.load_state_dict(_weights(folder / "model.safetensors", model), assign=True)
    model = model.to(device=usable_device(device), dtype=dtype).eval()
    return LoadedModel(model=model, tokenizer=tokenizer, folder=folder, end_of_text_name=end_of_text)


class DeviceError(ValueError):
    """There is no such device on this machine; the message lists those that there are."""


def devices() -> list[str]:
    """The devices of this machine that a model can be on."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def usable_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        DeviceError: there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not any(device == torch.device(one) or str(device) == one.split(":")[0] for one in devices()):
        raise DeviceError(f"no device {name!r} on this machine: must be one of {', '.join(devices())}")
    return device


def _instead(folder: Path) -> str:
    pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in sorted(folder.glob(pattern))]
    if pickled:
        return f"; it holds {pickled[0]}, but pickled weights can run code and are never loaded: convert to safetensors"
    if (folder / "model").is_dir():
        return f"; did you mean {folder / 'model'}?"
    return "; only finished runs have a model, in their folder `model`"


def _config(path: Path) -> ModelConfig:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{path} is damaged ({error}); train or export the model again") from error
    if isinstance(data, dict) and EXPORTED_CONFIG in data:
        data = data[EXPORTED_CONFIG]
    elif isinstance(data, dict) and "method" not in data:
        kind = data.get("model_type", "unknown")
        raise ModelFolderError(
            f"{path} is the config of a {kind!r} model and not haltscale's: it cannot be loaded here"
        )
    if not isinstance(data, dict):
        raise ModelFolderError(f"{path} does not contain an object; train or export the model again")
    try:
        config = config_from_dict(data)
        problems = config_problems(config)
    except (ValueError, TypeError) as error:
        raise ModelFolderError(f"{path} does not describe a model:\n{error}") from error
    if problems:
        raise ModelFolderError(f"{path} does not describe a model:\n" + "\n".join(problems))
    return config


def _tokenizer(path: Path, config: ModelConfig) -> tuple[Tokenizer, str]:
    """The tokenizer, and the name of its end-of-text."""
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = exact(text, None)
    except (TokenizerError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not a tokenizer ({error})") from error
    if (size := max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1) > config.vocab_size:
        raise ModelFolderError(
            f"{path} has {size} tokens, the model knows {config.vocab_size}: they do not belong"
            " together; take the tokenizer.json of the model's own run"
        )
    name = _named_end_of_text(path.with_name(TOKENIZER_CONFIG), tokenizer) or guessed_end_of_text(tokenizer)
    return exact(text, name), name


def _named_end_of_text(path: Path, tokenizer: Tokenizer) -> str | None:
    """End-of-text as ``tokenizer_config.json`` has it; None where that is not there, or does not say it."""
    if not path.is_file():
        return None
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ModelFolderError(f"{path} is damaged ({error}); train or export the model again") from error
    if isinstance(name, dict):  # as `transformers` writes a token with its options
        name = name.get("content")
    if name is not None and (not isinstance(name, str) or tokenizer.token_to_id(name) is None):
        raise ModelFolderError(f"{path} says eos_token {name!r}, which the tokenizer.json beside it does not have")
    return name


def _weights(path: Path, model: LanguageModel) -> dict[str, Any]:
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFolderError(
            f"{path} is damaged or not a safetensors file ({error}); copy or train it again"
        ) from error
    weights = {name.removeprefix(EXPORTED_PREFIX): weight for name, weight in weights.items()}
    expected = model.state_dict()
    found = [f"{name} is missing" for name in expected if name not in weights]
    found += [f"{name} is not the model's" for name in weights if name not in expected]
    for name in expected.keys() & weights.keys():
        if expected[name].shape != weights[name].shape:
            found.append(f"{name} is {list(weights[name].shape)}, should be {list(expected[name].shape)}")
        elif not weights[name].isfinite().all():
            found.append(f"{name} contains numbers that are not finite: the run diverged")
    if found:
        shown = "\n".join(f"  - {line}" for line in sorted(found)[:10])
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        raise ModelFolderError(f"{path} does not fit its config.json:\n{shown}{more}")
    return weights
