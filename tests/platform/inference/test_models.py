"""Loading finished models: the same results, and a sentence for everything that can be wrong with a folder."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from haltscale.model import METHODS, AdaptiveOptions, Method, ModelConfig, Shape, build_model
from haltscale.platform.corpora.tokenization import TokenizerError
from haltscale.platform.inference.models import ModelFolderError, load_model


def tokenizer(size: int, *, end: str = "<|endoftext|>") -> Tokenizer:
    words = [end, *map(str, range(size - 1))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=end))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def model_of(method: Method = Method.ADAPTIVE):
    options = AdaptiveOptions(l_max=2) if method is Method.ADAPTIVE else METHODS[method].options()
    shape = Shape(layers=3, d=16, heads=2, kv_heads=2, ffn=24)
    return build_model(ModelConfig(method=method, shape=shape, vocab_size=40, context=8, options=options), seed=0)


def save(model, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    tokenizer(40).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(model_of(), tmp_path / "model")


@pytest.mark.parametrize("method", list(Method))
def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, method):
    model = model_of(method).eval()
    loaded = load_model(save(model, tmp_path / "model"))
    assert not loaded.model.training
    assert loaded.model.config == model.config
    assert loaded.end_of_text == 0
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits_BTV, model(tokens).logits_BTV)


def test_weights_come_in_the_type_they_were_saved_in_or_as_asked(folder):
    save(model_of().bfloat16(), folder)
    assert next(load_model(folder).model.parameters()).dtype == torch.bfloat16
    assert next(load_model(folder, dtype=torch.float32).model.parameters()).dtype == torch.float32


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def cut(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


def foreign(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 16}))


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "exploded")))


def a_pickle_in_disguise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "exploded")))


DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    "weights cut off": (lambda f: cut(f, "model.safetensors", 5000), "damaged or not a safetensors"),
    "empty weights": (lambda f: cut(f, "model.safetensors", 0), "damaged or not a safetensors"),
    "config cut off": (lambda f: cut(f, "config.json", 40), "config.json is damaged"),
    "config of another library": (foreign, "config of a 'llama' model"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "does not contain an object"),
    "unknown option": (lambda f: edit(f, lambda c: c["options"].update(lamda=1)), "options.lamda"),
    "unsound option": (lambda f: edit(f, lambda c: c["options"].update(l_max=-1)), "l_max = -1"),
    "a weight is missing": (lambda f: rewrite(f, lambda w: w.pop("head.weight")), "head.weight is missing"),
    "a weight too many": (lambda f: rewrite(f, lambda w: w.update(x=torch.ones(1))), "x is not the model's"),
    "other size": (lambda f: edit(f, lambda c: c["shape"].update(ffn=32)), r"gate_up.weight is \[48, 16\], should be"),
    "not finite": (lambda f: rewrite(f, lambda w: w["head.weight"].fill_(torch.nan)), "not finite"),
    "tokenizer too large": (lambda f: tokenizer(41).save(str(f / "tokenizer.json")), "41 tokens, the model knows 40"),
    "tokenizer of others": (lambda f: tokenizer(40, end="x").save(str(f / "tokenizer.json")), "no end-of-text"),
    "tokenizer cut off": (lambda f: cut(f, "tokenizer.json", 100), "is not a tokenizer"),
    "only pickled weights": (only_a_pickle, "never loaded"),
    "pickled weights in disguise": (a_pickle_in_disguise, "damaged or not a safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_folder(folder, damage):
    spoil, said = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ModelFolderError, match=said):
        load_model(folder)
    assert not (folder / "exploded").exists(), "something was unpickled"


def test_a_folder_that_is_none(tmp_path, folder):
    with pytest.raises(ModelFolderError, match="is not a folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelFolderError, match=r"did you mean .*model"):
        load_model(folder.parent)


# ---- the tokenizer and its end-of-text ------------------------------------------------------------------------------


def with_tokenizer(folder: Path, made: Tokenizer, **settings) -> Path:
    made.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("eos_token", ["[STOP]", {"content": "[STOP]", "lstrip": False}])
def test_end_of_text_is_what_the_folder_says(folder, eos_token):
    """Also where the tokenizer has a token of one of the usual names."""
    made = tokenizer(40)
    made.add_special_tokens(["[STOP]"])
    words = {"<|endoftext|>": 0, "[STOP]": 1, **{str(n): n + 2 for n in range(30)}}
    made = Tokenizer(models.WordLevel(words, unk_token="0"))
    loaded = load_model(with_tokenizer(folder, made, eos_token=eos_token))
    assert loaded.end_of_text == 1
    assert loaded.tokenizer.id_to_token(loaded.end_of_text) == "[STOP]"
    (folder / "tokenizer_config.json").unlink()
    assert load_model(folder).end_of_text == 0, "of a folder of an older version it is guessed"


def test_end_of_text_that_the_tokenizer_does_not_have_is_refused(folder):
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json says eos_token '\[STOP\]', which"):
        load_model(with_tokenizer(folder, tokenizer(40), eos_token="[STOP]"))
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json is damaged"):
        load_model(folder)
    with_tokenizer(folder, tokenizer(40, end="[STOP]"), pad_token="0")
    with pytest.raises(ModelFolderError, match="no end-of-text token"):
        load_model(folder)


def test_a_finished_run_says_its_end_of_text(tmp_path):
    """As training leaves it behind, and as a checkpoint's folder is written."""
    from haltscale.platform.corpora.corpus import PreparedCorpus
    from haltscale.platform.recorder import RunRecorder
    from haltscale.platform.runs.finalize import export
    from haltscale.platform.store import RunStore

    corpus = PreparedCorpus(folder=tmp_path / "corpus", counts={"end_of_text": "[STOP]"})
    corpus.folder.mkdir()
    tokenizer(40, end="[STOP]").save(str(corpus.folder / "tokenizer.json"))
    store = RunStore(tmp_path / "runs")
    model = model_of()
    export(model, model.state_dict(), corpus, RunRecorder(store, "study", "key", steps=1))
    loaded = load_model(store.local_path("study", "key", "model"))
    assert loaded.tokenizer.id_to_token(loaded.end_of_text) == "[STOP]"
    older = PreparedCorpus(folder=corpus.folder, counts={"prepared": {"tokenizer": {"end_of_text": "</s>"}}})
    assert older.end_of_text == "</s>"
    assert PreparedCorpus(folder=corpus.folder, counts={}).end_of_text == "<|endoftext|>"


def test_prompts_are_encoded_as_training_encoded_documents(folder):
    made = tokenizer(40)
    made.enable_truncation(2)
    made.enable_padding(length=9)
    loaded = load_model(with_tokenizer(folder, made))
    assert loaded.tokenizer.encode("1 2 3 4").ids == [2, 3, 4, 5]
    assert loaded.encode(["1 2 3 4", "5"]) == [[2, 3, 4, 5], [6]]
    with pytest.raises(TokenizerError, match="half a surrogate pair"):
        loaded.encode(["1 \ud83d"])
