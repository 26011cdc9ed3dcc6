"""Runs that start from a Llama, against the Llama of transformers itself."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from haltscale.model import METHODS, AdaptiveOptions, Method, build_model, probing
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import ConfigError, Precision, RunConfig
from haltscale.platform.corpora.tokenization import BytePairs, Pretrained
from haltscale.platform.inference.export import export
from haltscale.platform.inference.models import LoadedModel
from haltscale.platform.initial_model import IMPORTED, InitialModelError
from haltscale.platform.llama import llama, load_into
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps import planning
from haltscale.platform.training.engine import full_weights, snapshot, start
from haltscale.platform.training.loop import train

from looping import Listener, batches, execution_of

VOCABULARY, CONTEXT = 300, 16
BYTES = Pretrained(name="bytes")


@pytest.fixture
def pretrained(tmp_path) -> Callable[..., tuple[LlamaForCausalLM, Path]]:
    """Makes a tiny Llama with grouped queries, and its folder; several files, if asked for."""

    def make(*, max_shard_size: str = "1GB", **changes) -> tuple[LlamaForCausalLM, Path]:
        torch.manual_seed(0)
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "rope_theta": 50_000.0,
            "initializer_range": 0.2,  # so that its logits are far apart
        }
        model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
        folder = tmp_path / "pretrained"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "tokenizer.json").write_text(BYTES.json)
        return model, folder

    return make


def run_from(folder: Path, method: Method = Method.VANILLA, **changes) -> RunConfig:
    values = {
        "size": IMPORTED,
        "method": method,
        "options": METHODS[method].options(),
        "init_from": llama(folder),
        "context": CONTEXT,
        "batch_tokens": 4 * CONTEXT,
        "tokens": 8 * 4 * CONTEXT,
        "precision": Precision.FP32,
    }
    return RunConfig(**(values | changes))


def imported(run: RunConfig):
    assert run.init_from is not None
    model = build_model(run.model_config(BYTES.vocab_size), seed=0)
    load_into(model, run.init_from)
    return model.eval()


TOKENS = torch.randint(VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits_BTV


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"max_shard_size": "20KB"}, {"rope_theta": 1e4}]
)
def test_vanilla_computes_what_the_llama_computes(pretrained, changes):
    theirs, folder = pretrained(**changes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("max_shard_size" in changes)
    with torch.no_grad():
        torch.testing.assert_close(logits(imported(run_from(folder))), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_adaptive_at_zero_steps_computes_what_the_llama_computes(pretrained):
    theirs, folder = pretrained()
    model = imported(run_from(folder, Method.ADAPTIVE))
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    for rules in ({"l_max": 0}, {"tau": 1.0}):
        with probing.rules_changed(model, **rules):
            torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert (logits(model) - expected).abs().max() > 0.1, "it does not think: the test has lost its subject"


@pytest.mark.parametrize("method", list(Method))
def test_every_method_starts_from_the_llama_and_with_its_own_parameters(pretrained, method):
    theirs, folder = pretrained()
    run = run_from(folder, method)
    model, fresh = imported(run), build_model(run.model_config(BYTES.vocab_size), seed=0)
    groups = model.parameter_groups_count()
    assert sum(groups.values()) - groups["method"] == sum(weight.numel() for weight in theirs.parameters())
    shared = 0
    for (name, one), (_, other) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        same = torch.equal(one, other)
        own = "router" in name or name == "pause"
        assert same == (own or "norm" in name), name  # norm gains start at one everywhere
        shared += not own
    assert shared == 3 + 6 * 3
    assert planning.cost(run, BYTES.vocab_size).bound > 0


def test_a_run_goes_on_training_and_is_exported(pretrained, tmp_path):
    """The first step's loss is the Llama's own; the end is loaded by transformers; a checkpoint needs no Llama."""
    theirs, folder = pretrained()
    run = run_from(folder, learning_rate=1e-2)
    stream = list(batches(run))
    tokens = torch.as_tensor(stream[0].tokens)
    with torch.no_grad():
        expected = float(theirs(tokens, labels=tokens).loss)
    execution = execution_of(run)
    checkpoints = Checkpoints(RunStore(tmp_path / "runs"), "study", "run")
    engine, progress = start(build_model(run.model_config(257), seed=0), run, execution, checkpoints)
    listener = Listener()
    listener.at_checkpoint = lambda progress: checkpoints.write(snapshot(engine), progress.to_dict())
    train(
        engine,
        iter([replace(stream[0], step=n) for n in range(8)]),
        run,
        progress,
        listener.hooks(),
        execution=execution,
    )
    checkpoints.wait()
    assert listener.rows[0]["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert listener.rows[-1]["cross_entropy"] < expected - 0.5
    for file in folder.iterdir():
        file.unlink()
    engine, progress = start(build_model(run.model_config(257), seed=0), run, execution, checkpoints)
    assert progress.step == 8
    model = build_model(run.model_config(257), seed=0)
    model.load_state_dict(full_weights(engine))
    loaded = LoadedModel(model=model.eval(), tokenizer=Tokenizer.from_str(BYTES.json), folder=folder)
    there = AutoModelForCausalLM.from_pretrained(export(loaded, tmp_path / "exported")).eval()
    with torch.no_grad():
        torch.testing.assert_close(there(TOKENS).logits, logits(model), atol=1e-5, rtol=1e-5)


def test_an_adaptive_run_starts_from_it(pretrained, tmp_path):
    _, folder = pretrained(tie_word_embeddings=True)
    run = run_from(folder, Method.ADAPTIVE, options=AdaptiveOptions(l_max=2, tau=0.3), learning_rate=1e-2)
    execution, checkpoints = execution_of(run), Checkpoints(RunStore(tmp_path / "runs"), "study", "run")
    engine, progress = start(build_model(run.model_config(257), seed=0), run, execution, checkpoints)
    started = {name: weight.clone() for name, weight in engine.module.state_dict().items()}
    assert torch.equal(
        started["embedding.weight"], load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    )
    listener = Listener()
    train(engine, batches(run), run, progress, listener.hooks(), execution=execution)
    assert all(not torch.equal(weight, started[name]) for name, weight in engine.module.state_dict().items())
    loaded = LoadedModel(model=engine.module.eval(), tokenizer=Tokenizer.from_str(BYTES.json), folder=folder)
    folder = export(loaded, tmp_path / "exported")
    there = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(there(TOKENS).logits, logits(engine.module), atol=1e-5, rtol=1e-5)


# What does not fit ---------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_a_llama_is_told_at_once(pretrained):
    _, folder = pretrained()
    config = json.loads((folder / "config.json").read_text())
    config |= {"attention_bias": True, "hidden_act": "gelu", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": None}))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InitialModelError) as refused:
        llama(folder)
    for said in (
        "attention_bias",
        "hidden_act must be 'silu' (got 'gelu')",
        "scaled (yarn)",
        "rms_norm_eps must be a number (got None)",
        "never loaded",
    ):
        assert said in str(refused.value)


def other_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "intermediate_size": 48}))


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "exploded")))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_kind, r"model_type must be 'llama' \(got 'gpt2'\)"),
        (fewer_layers, r"down_proj\.weight must have shape \[32, 48\] \(got \[32, 40\]\)"),
        (fewer_layers, r"and \d+ more"),
        (cut_off, "damaged or not a safetensors"),
        (pickled, "damaged or not a safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json and tokenizer.json are needed"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "config.json and tokenizer.json are needed"),
    ],
)
def test_what_is_wrong_with_a_folder(pretrained, spoil, said):
    _, folder = pretrained()
    spoil(folder)
    with pytest.raises(InitialModelError, match=said):
        llama(folder)
    assert not (folder / "exploded").exists(), "something was unpickled"


def test_no_such_model(tmp_path, monkeypatch):
    with pytest.raises(InitialModelError, match="neither a folder nor a name on the Hugging Face Hub"):
        llama(tmp_path / "nothing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InitialModelError, match="cannot be fetched from the Hub"):
        llama("nobody/nothing")


def test_a_name_on_the_hub(pretrained, monkeypatch):
    """The hub itself is not asked: what it would give is a folder."""
    _, folder = pretrained()
    asked = []

    def fetched(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any(pattern.endswith((".bin", "*")) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    there = llama("some-body/Tiny.Llama@v1")
    assert there == replace(llama(folder), source="some-body/Tiny.Llama@v1")
    load_into(build_model(run_from(folder).model_config(257), seed=0), there)
    assert asked == [("some-body/Tiny.Llama", "v1")] * 2


def test_weights_that_changed_since_the_plan(pretrained):
    _, folder = pretrained()
    run = run_from(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors")
    assert llama(folder).sha256 != run.init_from.sha256
    with pytest.raises(InitialModelError, match="has changed since the study was planned"):
        imported(run)


def test_all_that_does_not_fit_a_run_is_told_at_once(pretrained):
    _, folder = pretrained()
    found = run_from(folder, size="0.6m", context=128, batch_tokens=512).problems(301)
    assert len(found) == 3
    assert "size '0.6m' is Shape(layers=2" in found[0]
    assert "give size 'imported'" in found[0]
    assert "301 token ids, init_from has 300" in found[1]
    assert "context 128 is longer than that of init_from, 64" in found[2]
    assert run_from(folder).problems(257) == []
    assert "not on the ladder" in RunConfig(size=IMPORTED).problems()[0]


def test_the_corpus_must_have_the_models_tokenizer(pretrained, study, corpus):
    _, folder = pretrained()
    base = run_from(folder, tokens=1024)
    own = Pretrained(name=str(folder / "tokenizer.json"))
    assert study(base=base, corpus=corpus(tokenizer=own)).problems() == []
    assert study(base=base, corpus=corpus(tokenizer=BYTES)).problems() == []  # the same one
    [said] = study(base=base, corpus=corpus(tokenizer=BytePairs(vocab_size=280))).problems()
    assert "the corpus trains a tokenizer of its own" in said
    document = json.loads(BYTES.json)
    document["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "other.json").write_text(json.dumps(document))
    other = Pretrained(name=str(folder / "other.json"))
    [said] = study(base=base, corpus=corpus(tokenizer=other)).problems()
    assert "its tokenizer is not the corpus's" in said


def test_a_study_is_told_from_the_command_line(pretrained, study, corpus):
    _, folder = pretrained()
    plain = study(corpus=corpus(tokenizer=BYTES))
    told = plain.overridden([f"init_from={folder}", f"size={IMPORTED}"])
    assert told.base.init_from == llama(folder)
    assert {run.init_from for run in told.runs} == {llama(folder)}
    assert len(told.plan()) == 3
    with pytest.raises(ConfigError, match=r"init_from: .* neither a folder nor a name"):
        plain.overridden(["init_from=/nothing"])


def test_the_index_names_the_weights_and_leftovers_are_not_read(pretrained, tmp_path):
    """An earlier save in more parts has left files behind: what `transformers` loads is what is loaded."""
    _, old = pretrained(max_shard_size="10KB")
    leftovers = {path.name: path.read_bytes() for path in old.glob("model-*.safetensors")}
    for path in old.glob("model*"):
        path.unlink()
    torch.manual_seed(1)
    theirs = LlamaForCausalLM(LlamaConfig.from_pretrained(old))
    theirs.save_pretrained(old, max_shard_size="30KB")
    sound = llama(old)
    for name, content in leftovers.items():
        if not (old / name).exists():
            (old / name).write_bytes(content)
    initial = llama(old)
    assert initial.sha256 == sound.sha256
    model = build_model(run_from(old).model_config(VOCABULARY), seed=0)
    load_into(model, initial)
    torch.testing.assert_close(model.embedding.weight, theirs.model.embed_tokens.weight)
    index = old / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values())
    index.unlink()
    with pytest.raises(InitialModelError, match="and so does a file before it"):
        llama(old)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InitialModelError, match=r"names missing files: gone\.safetensors"):
        llama(old)
    assert named
