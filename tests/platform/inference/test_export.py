"""Exported models, loaded in a process that has transformers and the folder and cannot import haltscale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from haltscale.model import Method
from haltscale.platform.evaluation.scoring import Pair, log_likelihoods
from haltscale.platform.inference.export import ExportError, export, llama_weights, write_tokenizer
from haltscale.platform.inference.models import load_model
from haltscale.platform.inference.text_generation import write

ALONE = """
import json, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "haltscale":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
text = tokenizer(prompt, return_tensors="pt")
with torch.no_grad():
    logits = model(**text).logits
tokens = model.generate(**text, max_new_tokens=12, do_sample=False)[0, text["input_ids"].shape[1]:]
assert "haltscale.model" not in sys.modules
print(json.dumps({"ids": text["input_ids"][0].tolist(), "tokens": tokens.tolist(), "logits": logits[0].tolist()}))
"""


def alone(folder: Path, prompt: str, cache: Path) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ALONE, str(folder), prompt]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_export_alone_equals_the_original(finished, tmp_path):
    loaded = load_model(finished())
    folder = export(loaded, tmp_path / "out" / "exported-1.8m", record={"label": "a label", "loss": 4.5})
    assert not any("haltscale.model" in line for file in folder.glob("*.py") for line in imports(file))
    there = alone(folder, "In the beginning", tmp_path)
    assert there["ids"] == [0, *loaded.tokenizer.encode("In the beginning").ids]
    with torch.no_grad():
        here = loaded.model(torch.tensor([there["ids"]])).logits_BTV[0]
    torch.testing.assert_close(torch.tensor(there["logits"]), here, atol=1e-5, rtol=1e-5)
    written = list(write(loaded, ["In the beginning"], new_tokens=12))
    assert there["tokens"] == [token.token_id for token in written]
    card = (folder / "README.md").read_text()
    assert "# a label" in card
    assert "| held-out loss (nats per token) | 4.5 |" in card
    assert "trust_remote_code" in card


def imports(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]


def test_vanilla_becomes_a_plain_llama(finished, tmp_path):
    loaded = load_model(finished(Method.VANILLA))
    folder = export(loaded, tmp_path / "plain")
    assert not list(folder.glob("*.py"))
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    llama, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert isinstance(llama, LlamaForCausalLM)
    text = tokenizer("In the beginning", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            llama(**text).logits, loaded.model(text["input_ids"]).logits_BTV, atol=1e-5, rtol=1e-5
        )
    tokens = llama.generate(**text, max_new_tokens=12, do_sample=False)[0, text["input_ids"].shape[1] :]
    written = list(write(loaded, ["In the beginning"], new_tokens=12))
    assert tokens.tolist() == [token.token_id for token in written]


@pytest.mark.parametrize("method", [m for m in Method if m not in (Method.VANILLA, Method.ADAPTIVE)])
def test_every_method_can_be_exported(finished, tmp_path, method):
    """In this process; that the copied code is what runs is seen from its module's name."""
    loaded = load_model(finished(method))
    folder = export(loaded, tmp_path / str(method))
    there = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(there.inner).__module__.startswith("transformers_modules.")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        here = loaded.model(tokens).logits_BTV
        torch.testing.assert_close(there(tokens).logits, here, atol=1e-5, rtol=1e-5)
    again = load_model(folder)
    assert again.model.config == loaded.model.config
    assert torch.equal(again.model.embedding.weight, loaded.model.embedding.weight)


@pytest.mark.parametrize("method", [m for m in Method if m is not Method.VANILLA])
def test_an_export_can_be_trained(finished, tmp_path, method, monkeypatch):
    """One pass, the mean cross-entropy of the next tokens as transformers shifts them, and gradients of exactly it."""
    folder = export(load_model(finished(method)), tmp_path / str(method))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    passes: list[int] = []
    forward = model.inner.forward
    monkeypatch.setattr(model.inner, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    torch.manual_seed(0)
    ids = torch.randint(1, 200, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    for train in (False, True):
        model.train(train)
        model.zero_grad()
        passes.clear()
        answer = model(ids, labels=labels)
        assert passes == [1]
        expected = torch.nn.functional.cross_entropy(
            answer.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        torch.testing.assert_close(answer.loss, expected)
        wanted = torch.autograd.grad(expected, model.inner.embedding.weight, retain_graph=True)[0]
        answer.loss.backward()
        torch.testing.assert_close(model.inner.embedding.weight.grad, wanted)
        assert wanted.abs().sum() > 0
    # as the Trainer calls it where it accumulates gradients
    summed = model.eval()(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(summed * 100, model(ids, labels=labels).loss * (labels[:, 1:] != -100).sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = model(ids, labels=labels).loss
    before.backward()
    optimizer.step()
    assert model(ids, labels=labels).loss < before


def test_the_card_says_what_the_code_does(finished, tmp_path):
    card = (export(load_model(finished()), tmp_path / "out") / "README.md").read_text()
    assert "no cache" not in card
    assert "keeps keys and values" in card


def test_in_bfloat16_it_is_no_further_from_the_truth_than_transformers(finished, tmp_path):
    """The two differ by the rounding of bfloat16 (2.5e-3 of logits of 0.6, about the same with rotary angles in
    float32 on both sides): each is as far from what float32 makes of the very same weights."""
    loaded = load_model(finished(Method.VANILLA), dtype=torch.bfloat16)
    plain = LlamaForCausalLM.from_pretrained(export(loaded, tmp_path / "plain"), dtype=torch.float32).eval()
    torch.manual_seed(0)
    ids = torch.randint(1, 200, (8, 64))
    with torch.no_grad():
        ours, truth = loaded.model(ids).logits_BTV.float(), plain(ids).logits
        theirs = plain.to(torch.bfloat16)(ids).logits.float()
    error, other = ((one - truth).square().mean().sqrt() for one in (ours, theirs))
    assert 0 < error < 1.1 * other
    assert (ours - theirs).square().mean().sqrt() < 2 * other


@pytest.fixture
def exported(finished, tmp_path):
    """(what was exported, the model and the tokenizer that transformers loads) of a method."""

    def load(method: Method = Method.ADAPTIVE):
        loaded = load_model(finished(method))
        folder = export(loaded, tmp_path / f"exported-{method}")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        return loaded, model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    return load


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(exported, side):
    _, model, tokenizer = exported()
    assert tokenizer.padding_side == "left", "as pipelines need it"
    both = tokenizer(["abc", "a longer text"], return_tensors="pt", padding=True, padding_side=side)
    assert not both["attention_mask"].all()
    short = both["attention_mask"][0].bool()
    with torch.no_grad():
        alone = model(**tokenizer("abc", return_tensors="pt")).logits[0]
        torch.testing.assert_close(model(**both).logits[0, short], alone)
        cached = model(**both, use_cache=True).logits
        torch.testing.assert_close(cached[0, short], alone)
        for kept in (1, 3):
            last = model(**both, use_cache=True, logits_to_keep=kept).logits
            torch.testing.assert_close(last, cached[:, -kept:])
            torch.testing.assert_close(model(**both, logits_to_keep=kept).logits, cached[:, -kept:])
        losses = [model(**one, labels=one["input_ids"]).loss for one in
                  (tokenizer(text, return_tensors="pt") for text in ("abc", "a longer text"))]  # fmt: skip
    labels = both["input_ids"].masked_fill(both["attention_mask"] == 0, -100)
    scored = both["attention_mask"].sum(1) - 1  # nothing predicts a first token
    expected = (torch.stack(losses) * scored).sum() / scored.sum()
    torch.testing.assert_close(model(**both, labels=labels).loss, expected)
    torch.testing.assert_close(model(**both, labels=both["input_ids"]).loss, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("method", [Method.ADAPTIVE, Method.SHUFFLED, Method.MOR, Method.PONDER2])
def test_a_pipeline_continues_a_batch_of_unequal_texts(exported, method, use_cache):
    """Each as if alone, and as the original does."""
    loaded, model, tokenizer = exported(method)
    texts = ["In the beginning", "It", "a longer text than the others"]
    written = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_tensors": True, "use_cache": use_cache}
    together = written(texts, batch_size=3, **settings)
    for text, [one] in zip(texts, together, strict=True):
        [alone] = written(text, **settings)
        ids = [token for token in one["generated_token_ids"] if token != tokenizer.pad_token_id]
        assert ids == [token for token in alone["generated_token_ids"] if token != tokenizer.pad_token_id]
        if use_cache:
            own = [token.token_id for token in write(loaded, [text], new_tokens=8)]
            prompt = loaded.tokenizer.encode(text).ids
            assert ids == [*prompt, *(token for token in own if token != tokenizer.pad_token_id)]


def test_lm_evaluation_harness_reads_and_continues_batches(exported, tmp_path):
    """Its own `hf` model: likelihoods and continuations of unequal texts in a batch, as the original's."""
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    loaded, model, tokenizer = exported()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=loaded.model.config.context)
    texts = ["In the beginning", "It", "a longer text than the others"]
    pairs = [(text, " was") for text in texts]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    found = [nats for nats, _ in harness.loglikelihood(asked, disable_tqdm=True)]
    own, _ = log_likelihoods(loaded, [Pair(*([0, *ids] if n == 0 else ids for n, ids in enumerate(loaded.encode(pair))))
                                      for pair in pairs])  # fmt: skip
    assert found == pytest.approx([one.log_likelihood for one in own], abs=1e-4)
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, settings), n) for n, text in enumerate(texts)]
    for text, continued in zip(texts, harness.generate_until(asked, disable_tqdm=True), strict=True):
        ids = [token.token_id for token in write(loaded, [text], new_tokens=8)]
        assert continued == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("method", [m for m in Method if m is not Method.VANILLA])
def test_generate_reads_every_token_once(finished, tmp_path, method, monkeypatch):
    """With its cache, an exported model of any method writes what the original writes; and what it writes without,
    where decoding does what the parallel pass does."""
    loaded = load_model(finished(method))
    folder = export(loaded, tmp_path / str(method))
    there = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    [prompt, other] = (loaded.tokenizer.encode(text).ids for text in ("In the beginning", "It is no use at "))
    both = torch.tensor([[0, *prompt], [0, *other]])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(both)}
    whole = there.generate(both, **settings, use_cache=False)
    read: list[int] = []
    step, prompts = there.inner.decode_step, there.inner.read_prompts
    monkeypatch.setattr(
        there.inner, "decode_step", lambda tokens, state: read.append(len(tokens)) or step(tokens, state)
    )
    monkeypatch.setattr(
        there.inner, "read_prompts", lambda texts, state: read.append(sum(map(len, texts))) or prompts(texts, state)
    )
    monkeypatch.setattr(there.inner, "forward", lambda *_, **__: pytest.fail("a text was read again"))
    cached = there.generate(both, **settings)
    assert read == [both.numel(), *[2] * 11]
    if method not in (Method.PONDER, Method.PONDER2, Method.MOR, Method.ADAPONDER):
        assert cached.tolist() == whole.tolist()
    own = [list(write(loaded, [text], new_tokens=12)) for text in ("In the beginning", "It is no use at ")]
    for row, tokens in zip(cached[:, both.shape[1] :].tolist(), own, strict=True):
        assert row[: len(tokens)] == [token.token_id for token in tokens]


def test_drawing_and_beams_with_the_cache(finished, tmp_path):
    folder = export(load_model(finished()), tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    prompt = torch.tensor([[0, 5, 6, 7]])

    def drawn(seed: int, **settings) -> list[int]:
        torch.manual_seed(seed)
        return model.generate(prompt, max_new_tokens=10, do_sample=True, temperature=2.0, **settings)[0].tolist()

    assert drawn(1) == drawn(1, use_cache=False) != drawn(2)
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, **beams, use_cache=False))
    read = model(prompt, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="contain padding"):
        model(prompt, attention_mask=torch.tensor([[1] * 7 + [0]]), past_key_values=read, use_cache=True)


def test_a_tied_vanilla_model_becomes_an_untied_llama(finished, tmp_path):
    from dataclasses import replace

    from haltscale.model import build_model

    loaded = load_model(finished(Method.VANILLA))
    tied = build_model(replace(loaded.model.config, tie_embeddings=True), seed=0)
    weights = llama_weights(tied)
    torch.testing.assert_close(weights["lm_head.weight"] * tied.embedding_factor, weights["model.embed_tokens.weight"])


def test_an_existing_folder_is_left_alone(finished, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(ExportError, match="exists"):
        export(load_model(finished()), tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "precious"


def test_an_export_that_fails_leaves_nothing(finished, tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("haltscale.platform.inference.export.save_file", disk_full)
    loaded = load_model(finished(folder=tmp_path / "source"))
    with pytest.raises(OSError, match="disk full"):
        export(loaded, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


POST_PROCESSORS = {
    "bos": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
    "bert": processors.BertProcessing(("<s>", 1), ("0", 2)),
    "roberta": processors.RobertaProcessing(("<s>", 1), ("0", 2)),
    "offsets": processors.ByteLevel(trim_offsets=True),
}


@pytest.mark.parametrize("end", ["<|endoftext|>", "$A:0", "the end"])
@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_an_exported_tokenizer_begins_texts_as_training_did(tmp_path, kind, end):
    words = {end: 0, "<s>": 1, **{str(n): n + 2 for n in range(9)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = POST_PROCESSORS[kind]
    made.enable_truncation(3)
    write_tokenizer(made, 0, 8, tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported("0 1 2 3 4 5")["input_ids"] == [0, 2, 3, 4, 5, 6, 7]
    assert exported.eos_token == end


def test_a_model_whose_end_of_text_has_a_name_of_its_own_is_exported_with_it(finished, tmp_path):
    folder = finished(Method.VANILLA)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|endoftext|>", "[STOP]"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[STOP]"}))
    loaded = load_model(folder)
    again = load_model(export_own(loaded, tmp_path))
    assert again.end_of_text == loaded.end_of_text == 0
    assert [t.token_id for t in write(again, ["In the"], new_tokens=3, stop=["[STOP]"])]


def export_own(loaded, tmp_path: Path) -> Path:
    """A vanilla model exported with its own config, which can be loaded here again."""
    folder = export(loaded, tmp_path / "out")
    (folder / "config.json").write_text((loaded.folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes((loaded.folder / "model.safetensors").read_bytes())
    return folder
