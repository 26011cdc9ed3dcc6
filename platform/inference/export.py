"""Export a model for `transformers`: safetensors, config, tokenizer, model card, and the code it needs.

A vanilla model becomes a plain Llama. Any other takes its code along: the very files of haltscale.model, their imports
made relative, so that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` needs `transformers` and
the folder alone.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from haltscale.model import METHODS, LanguageModel, Method, ModelConfig
from haltscale.platform.corpora.tokenization import exact
from haltscale.platform.inference.models import (
    EXPORTED_CONFIG,
    EXPORTED_PREFIX,
    TOKENIZER_CONFIG,
    LoadedModel,
    end_of_text_config,
)
from haltscale.platform.llama import llama_parts

MODELING = "haltscale.platform.inference.huggingface"
MODEL = "haltscale.model"


class ExportError(ValueError):
    """A model cannot be exported there; the message says what to do."""


class UnwritableError(ExportError, OSError):
    """The folder cannot be made or filled; the message says what the system said."""


def export(loaded: LoadedModel, target: str | Path, *, record: Mapping[str, Any] | None = None) -> Path:
    """Write a model to a new folder, whole or not at all.

    Args:
        record: the run's, for the model card.

    Raises:
        ExportError: the folder exists.
        UnwritableError: it cannot be written.
    """
    try:
        target = Path(target).expanduser().absolute()
    except RuntimeError as error:
        raise ExportError(f"{target}: {error}") from error
    try:
        if target.exists():
            raise ExportError(f"{target} exists: name a new folder, or remove that one")
        target.parent.mkdir(parents=True, exist_ok=True)
        return _write(loaded, target, record or {})
    except OSError as error:
        raise UnwritableError(f"{target} cannot be written ({error}): name another folder") from error


def _write(loaded: LoadedModel, target: Path, record: Mapping[str, Any]) -> Path:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as partial:
        folder = Path(partial) / "model"
        folder.mkdir()
        model = loaded.model
        if model.config.method is Method.VANILLA:
            config, weights = llama_config(model.config), llama_weights(model)
        else:
            config, weights = own_config(model.config), own_weights(model)
            write_code(folder, model.config.method)
        end = loaded.end_of_text
        config |= {"dtype": str(next(iter(weights.values())).dtype).removeprefix("torch.")}
        config |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        _json(folder / "config.json", config)
        _json(folder / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
        write_tokenizer(loaded.tokenizer, end, model.config.context, folder)
        (folder / "README.md").write_text(model_card(model, record), encoding="utf-8")
        shutil.move(folder, target)
    return target


def _json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


# The plain model ----------------------------------------------------------------------------------------------------


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a vanilla model."""
    shape = config.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": shape.d,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def llama_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """A vanilla model's weights under Llama's names, float32. The scale of the embeddings goes into their table, so a
    tied head becomes one of its own."""
    weights = {name: weight.detach().float().cpu() for name, weight in model.state_dict().items()}
    embedding, head = (matrix.detach().float().cpu() for matrix in model.vocabulary_matrices())
    weights |= {"embedding.weight": embedding * model.embedding_factor, "head.weight": head}
    found: dict[str, torch.Tensor] = {}
    for own, parts in llama_parts(model.config.shape, tie_embeddings=False).items():
        rows = [len(weights[own])] if len(parts) == 1 else [shape[0] for shape in parts.values()]
        found |= dict(zip(parts, weights[own].split(rows), strict=True))
    return {name: weight.contiguous().clone() for name, weight in found.items()}


# Models that take their code along ------------------------------------------------------------------------------------


def own_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of any other model: its own configuration, and where `transformers` finds the code."""
    return {
        "architectures": ["HaltscaleForCausalLM"],
        "model_type": "haltscale",
        "auto_map": {
            "AutoConfig": "modeling_haltscale.HaltscaleConfig",
            "AutoModelForCausalLM": "modeling_haltscale.HaltscaleForCausalLM",
        },
        "use_cache": True,
        EXPORTED_CONFIG: config.to_dict(),
    }


def own_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights as they are, under the wrapper's names."""
    return {EXPORTED_PREFIX + name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}


def write_code(folder: Path, method: str = Method.ADAPTIVE) -> None:
    """The modelling code and every file that it needs of haltscale.model and of the method's own package, flat, with
    relative imports.

    Raises:
        ExportError: the method is another package's, and a file of it imports what an export cannot include.
    """
    entry = METHODS[method].model.__module__
    own = entry.partition(".")[0]
    packages = ("haltscale", own)
    waiting, written = [MODELING], set[str]()
    if own != "haltscale":
        waiting.append(entry)
    while waiting:
        module = waiting.pop()
        if module in written:
            continue
        written.add(module)
        source, needed = _flat(module, _source(module), packages)
        if module == MODELING and own != "haltscale":
            source += _registration(method, entry)
        (folder / f"{_flat_name(module)}.py").write_text(source, encoding="utf-8")
        waiting += needed


def _flat(module: str, source: str, packages: tuple[str, ...]) -> tuple[str, list[str]]:
    """A file whose imports of these packages are those of files beside it, and the modules that it imports."""
    lines, needed = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            if wrong := [alias.name for alias in node.names if alias.name.partition(".")[0] in packages]:
                raise ExportError(f"{module}, line {node.lineno}: import {wrong[0]}: write it as from ... import ...")
            continue
        if not isinstance(node, ast.ImportFrom) or _target(node, module).partition(".")[0] not in packages:
            continue
        statements: dict[str, list[str]] = {}
        for alias in node.names:
            found, is_module = _defined_in(_target(node, module), alias.name)
            if found.startswith("haltscale.") and not found.startswith(f"{MODEL}."):
                raise ExportError(
                    f"{module}, line {node.lineno}: {found} is not part of {MODEL}, and an export takes nothing else of"
                    " haltscale along: move what needs it out of the method's files"
                )
            needed.append(found)
            name, known_as = (_flat_name(found) if is_module else alias.name), alias.asname or alias.name
            from_file = "" if is_module else _flat_name(found)
            statements.setdefault(from_file, []).append(name if name == known_as else f"{name} as {known_as}")
            if is_module:  # transformers copies the files of imports of this form only
                statements.setdefault(name, []).append(f"__name__ as _{name}")
        written = [f"from .{file} import {', '.join(names)}\n" for file, names in statements.items()]
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        lines[first:last] = ["".join(" " * node.col_offset + line for line in written), *[""] * (last - first - 1)]
    return "".join(lines), needed


def _target(node: ast.ImportFrom, module: str) -> str:
    """The full name of what a file of a module imports from."""
    spec = importlib.util.find_spec(module)
    return importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent if spec else None)


def _defined_in(module: str, name: str) -> tuple[str, bool]:
    """The module that ``from module import name`` takes the name from, and whether it is the name: a package's
    ``__init__`` only hands names on."""
    if not hasattr(importlib.import_module(module), "__path__"):
        return module, False
    if importlib.util.find_spec(f"{module}.{name}"):
        return f"{module}.{name}", True
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return _defined_in(_target(node, module), name)
    return module, False


def _flat_name(module: str) -> str:
    """The name of a module's file in an export."""
    if module == MODELING:
        return "modeling_haltscale"
    return module.removeprefix(f"{MODEL}.") if module.startswith(MODEL) else module.replace(".", "_")


def _registration(method: str, module: str) -> str:
    """The end of the modelling code for a method of another package: it adds its entry to the methods."""
    found = [name for name, value in vars(sys.modules[module]).items() if value is METHODS[method]]
    if not found:
        raise ExportError(f"the MethodEntry of {method} must stand in the file of its model, {module}: move it there")
    return f"\nfrom .{_flat_name(module)} import {found[0]} as ENTRY\n\nMETHODS[{str(method)!r}] = ENTRY\n"


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


# What both have -------------------------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: Tokenizer, end: int, context: int, folder: Path) -> None:
    """The tokenizer, which puts end-of-text before every text and nothing else, as training did."""
    name = str(tokenizer.id_to_token(end))
    document = json.loads(exact(tokenizer.to_str(), name).to_str())
    document["post_processor"] = _prefix(name, end)
    Tokenizer.from_str(json.dumps(document)).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **end_of_text_config(name),
        "pad_token": name,
        "padding_side": "left",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    _json(folder / TOKENIZER_CONFIG, settings)


def _prefix(name: str, end: int) -> dict[str, Any]:
    """A post-processor that puts a token before a text. As JSON, since ``$`` and ``:`` divide a template in words."""
    first, second = ({"Sequence": {"id": part, "type_id": index}} for index, part in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, first],
        "pair": [first, second],
        "special_tokens": {name: {"id": name, "ids": [end], "tokens": [name]}},
    }


def model_card(model: LanguageModel, record: Mapping[str, Any]) -> str:
    """The README of an exported model: what it is, how to load it, the run's figures."""
    config, plain = model.config, model.config.method is Method.VANILLA
    identity = record.get("identity", {})
    rows = {
        "held-out loss (nats per token)": record.get("loss"),
        "standard error": record.get("loss_standard_error"),
        "perplexity": record.get("perplexity"),
        "bits per byte": record.get("bits_per_byte"),
        "latent steps per token": record.get("mean_steps"),
        "held-out tokens": record.get("tokens_evaluated"),
        "training tokens": record.get("tokens"),
        "training step": record.get("step"),
        "training FLOPs, realised": record.get("flops_realised"),
        "training FLOPs, paper's convention": record.get("flops_paper"),
        "parameters": record.get("parameters_total", sum(model.parameter_groups_count().values())),
    }
    figures = "\n".join(f"| {name} | {_shown(value)} |" for name, value in rows.items() if value is not None)
    trust = "" if plain else ", trust_remote_code=True"
    about = {
        "method": config.method,
        "size": identity.get("size"),
        "options": json.dumps(config.to_dict()["options"]),
        "corpus": identity.get("corpus"),
        "seed": identity.get("seed"),
        "run": record.get("key"),
        "study": record.get("study"),
        "commit": record.get("git_commit"),
    }
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items() if value is not None)
    halting = (
        "A plain Llama: one pass per token."
        if plain
        else "The model may think several latent steps before each token. `generate` keeps keys and values from token"
        " to token in the model's own cache (beam search goes without one). Texts of unequal length go together, padded"
        " on either side. `model(ids, labels=ids).loss` is the cross-entropy alone: fine-tuning with"
        " it puts no price on latent steps."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {record.get("label", f"{config.method} model")}

Trained and exported with haltscale. {halting}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)[0]))
```

{facts}

| figure | value |
|---|---|
{figures}

The context is {config.context} tokens; every text begins with the end-of-text token, which the tokenizer adds.
"""


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
