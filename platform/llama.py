"""Plain Llamas of `transformers`: how their weights are named, and runs that start from one.

    base=RunConfig(init_from=llama("/models/smol"), size="imported", method="adaptive", ...)

A run of any method begins with the Llama's weights; what the method has besides (a router, a pause) starts as it always
does. Embeddings are read as the Llama reads them, without the scale that new models have, so that vanilla computes what
the Llama computes, and so does adaptive at zero latent steps. Only safetensors are read; nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from haltscale.model import LanguageModel, Shape
from haltscale.model.language_model import canonical_name
from haltscale.platform.identity import canonical_json
from haltscale.platform.initial_model import InitialModel, InitialModelError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
WEIGHTS_INDEX = "model.safetensors.index.json"
FETCHED = ("config.json", "tokenizer.json", "*.safetensors", WEIGHTS_INDEX)


def llama(source: str | Path) -> InitialModel:
    """A Llama in the format of `transformers`, to start runs from.

    Args:
        source: a folder with ``config.json``, ``tokenizer.json`` and safetensors, or ``organisation/name`` or
            ``organisation/name@revision`` on the Hugging Face Hub.

    Raises:
        InitialModelError: it is not there, or no Llama that can be read exactly; the message lists all reasons.
    """
    folder, name = _located(str(source))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = tokenizer_digest(Tokenizer.from_file(str(folder / "tokenizer.json")).to_str())
    except Exception as error:  # the tokenizers library raises bare ones
        raise InitialModelError(f"{name}: config.json and tokenizer.json are needed ({error})") from error
    found = _config_problems(config)
    if not _weight_files(folder):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found.append(
            f"it has {pickled[0]}, but pickled weights can run code and are never loaded: convert to safetensors"
            if pickled
            else "it has no safetensors"
        )
    if found:
        raise InitialModelError("\n  - ".join([f"{name} is not a Llama that a run can start from:", *found]))
    initial = InitialModel(
        source=name,
        sha256=_weights_digest(folder),
        tokenizer_sha256=tokenizer,
        shape=_shape(config),
        vocab_size=config["vocab_size"],
        context=config["max_position_embeddings"],
        rope_theta=float(_rope(config).get("rope_theta", config.get("rope_theta", 10_000.0))),
        norm_eps=config["rms_norm_eps"],
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    )
    with _Weights(folder, name) as weights:
        if found := [*initial.shape.problems(), *weights.problems(initial)]:
            raise InitialModelError("\n  - ".join([f"{name} is not a Llama that a run can start from:", *found]))
    return initial


def _located(source: str) -> tuple[Path, str]:
    """The folder of a model, and the name that means it on any node."""
    folder = Path(source).expanduser().absolute()
    if folder.is_dir():
        return folder, str(folder)
    if not _HUB_NAME.fullmatch(source):
        raise InitialModelError(f"{source} is neither a folder nor a name on the Hugging Face Hub (organisation/name)")
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FETCHED))), source
    except Exception as error:  # of the network, of the hub, of the cache
        raise InitialModelError(f"{source} is not a folder, and cannot be fetched from the Hub ({error})") from error


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    """What keeps a model from being computed exactly as it is."""
    kind = config.get("model_type")
    if kind != "llama":
        return [f"model_type must be 'llama' (got {kind!r})"]
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    found = [
        f"{name} must be an integer above 0 (got {config.get(name)!r})"
        for name in (*needed, "max_position_embeddings")
        if not isinstance(config.get(name), int) or config[name] < 1
    ]
    if not isinstance(config.get("rms_norm_eps"), float):
        found.append(f"rms_norm_eps must be a number (got {config.get('rms_norm_eps')!r})")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            found.append(f"{name} is true: these models have no biases")
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act must be 'silu' (got {config['hidden_act']!r})")
    if (rope := _rope(config).get("rope_type", _rope(config).get("type", "default"))) != "default":
        found.append(f"its rotary positions are scaled ({rope}), which these models do not do")
    if not found and (own := config.get("head_dim")) not in (None, _shape(config).head_dim):
        found.append(f"head_dim must be hidden_size / num_attention_heads = {_shape(config).head_dim} (got {own})")
    return found


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _shape(config: Mapping[str, Any]) -> Shape:
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        d=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        ffn=config["intermediate_size"],
    )


def tokenizer_digest(text: str) -> str:
    """SHA-256 of what a ``tokenizer.json`` makes of a text; what it puts around it, cuts off or drops at random, which
    training does not obey, does not count."""
    document = json.loads(text)
    for name in ("post_processor", "truncation", "padding"):
        document.pop(name, None)
    if document["model"].get("dropout"):
        document["model"]["dropout"] = None
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, as `transformers` finds them: one whole file, else those that the index names,
    without what an earlier save in more parts has left behind. Without an index, every file.

    Raises:
        InitialModelError: the index is damaged, or names files that are not there.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InitialModelError(f"{index} is damaged ({error!r}): copy the model again") from error
    if missing:
        raise InitialModelError(f"{index} names missing files: {', '.join(missing)}; copy the model again")
    return [folder / name for name in names]


def _weights_digest(folder: Path) -> str:
    files = _weight_files(folder)
    digests = [(file.name, _file_digest(file, file.stat().st_size, file.stat().st_mtime_ns)) for file in files]
    return hashlib.sha256(canonical_json(digests).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Weights -------------------------------------------------------------------------------------------------------------


def llama_parts(shape: Shape, *, tie_embeddings: bool) -> dict[str, dict[str, list[int]]]:
    """For each weight that all methods share, by its canonical name: the Llama's weights that it consists of, one above
    the other, with their shapes."""
    d, kv = shape.d, shape.kv_heads * shape.head_dim
    parts: dict[str, dict[str, list[int]]] = {
        "embedding.weight": {"model.embed_tokens.weight": [-1, d]},
        "stack.final_norm.weight": {"model.norm.weight": [d]},
    }
    if not tie_embeddings:
        parts["head.weight"] = {"lm_head.weight": [-1, d]}
    for layer in range(shape.layers):
        own, theirs = f"stack.blocks.{layer}", f"model.layers.{layer}"
        query, key, value = (f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv")
        gate, up = f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"
        parts |= {
            f"{own}.qkv.weight": {query: [d, d], key: [kv, d], value: [kv, d]},
            f"{own}.out.weight": {f"{theirs}.self_attn.o_proj.weight": [d, d]},
            f"{own}.gate_up.weight": {gate: [shape.ffn, d], up: [shape.ffn, d]},
            f"{own}.down.weight": {f"{theirs}.mlp.down_proj.weight": [d, shape.ffn]},
            f"{own}.attention_norm.weight": {f"{theirs}.input_layernorm.weight": [d]},
            f"{own}.mlp_norm.weight": {f"{theirs}.post_attention_layernorm.weight": [d]},
        }
    return parts


class _Weights:
    """The tensors of a folder's safetensors, read on demand."""

    def __init__(self, folder: Path, name: str) -> None:
        self._where: dict[str, Any] = {}
        self.name = name
        try:
            for path in _weight_files(folder):
                file = safe_open(path, framework="pt")
                if twice := self._where.keys() & set(file.keys()):
                    both = f"{name}: {path.name} holds {min(twice)}, and so does a file before it"
                    raise InitialModelError(f"{both}: remove the wrong one, or name the files in {WEIGHTS_INDEX}")
                self._where |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise InitialModelError(f"{name}: {path.name} is damaged or not a safetensors file ({error})") from error

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._where.clear()

    def problems(self, initial: InitialModel) -> list[str]:
        """Weights that are missing, of another shape, or unknown."""
        parts = llama_parts(initial.shape, tie_embeddings=initial.tie_embeddings)
        expected = {name: shape for own in parts.values() for name, shape in own.items()}
        found = [f"{name} is missing" for name in expected if name not in self._where]
        ignored = {"lm_head.weight"} if initial.tie_embeddings else set()
        for name, file in self._where.items():
            if name not in expected:
                if name not in ignored and not name.endswith("rotary_emb.inv_freq"):
                    found.append(f"{name} has no place in these models")
                continue
            wanted = [initial.vocab_size if size == -1 else size for size in expected[name]]
            if (shape := list(file.get_slice(name).get_shape())) != wanted:
                found.append(f"{name} must have shape {wanted} (got {shape})")
        more = [f"and {len(found) - 10} more"] if len(found) > 10 else []
        return [*sorted(found)[:10], *more]

    def read(self, names: Mapping[str, Any]) -> torch.Tensor:
        """Some weights, one above the other, float32."""
        return torch.cat([self._where[name].get_tensor(name).float() for name in names])


@torch.no_grad()
def load_into(model: LanguageModel, initial: InitialModel) -> None:
    """Give a new model of any method the weights of a Llama; its other parameters stay as they are.

    Raises:
        InitialModelError: the weights are no longer there, or no longer those of the run.
    """
    folder, name = _located(initial.source)
    if (found := _weights_digest(folder)) != initial.sha256:
        raise InitialModelError(
            f"{name} has changed since the study was planned (its weights' hash is {found[:12]}, was"
            f" {initial.sha256[:12]}): plan the study again, or bring the old weights back"
        )
    parts = llama_parts(initial.shape, tie_embeddings=initial.tie_embeddings)
    with _Weights(folder, name) as weights:
        for own_name, parameter in model.named_parameters():
            if (own := parts.pop(canonical_name(own_name), None)) is not None:
                read = weights.read(own)
                if not read.isfinite().all():
                    raise InitialModelError(f"{name}: {', '.join(own)} contains numbers that are not finite")
                parameter.copy_(read)
    assert not parts, f"the model has no place for {sorted(parts)}"
