"""One bad request, item or tokenizer file among many: named, and the rest goes on."""

import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from haltscale.platform.evaluation.evaluation_jobs import EvaluationError, open_corpus
from haltscale.platform.evaluation.scoring import Pair, log_likelihoods, score
from haltscale.platform.evaluation.tasks import Item, Task, TaskError, task_file
from haltscale.platform.inference.export import export
from haltscale.platform.inference.models import DeviceError, TextError, encode, load_model, usable_device


@pytest.fixture
def loaded(finished):
    return load_model(finished())


@pytest.fixture
def harness(loaded, monkeypatch):
    """The adapter; the harness itself is an extra, and only its two base classes are needed here."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.instance", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval.api.instance"].Instance = SimpleNamespace
    sys.modules["lm_eval.api.model"].TemplateLM = type("TemplateLM", (), {"__init__": lambda self: None})
    monkeypatch.delitem(sys.modules, "haltscale.platform.evaluation.harness", raising=False)
    from haltscale.platform.evaluation.harness import HaltscaleLM

    yield HaltscaleLM(loaded)
    sys.modules.pop("haltscale.platform.evaluation.harness", None)


def test_odd_requests_of_the_harness_are_named_and_the_rest_is_scored(harness, loaded, caplog):
    room = loaded.model.config.context
    good = [("a", "b"), [1, 2, 3], [4, 5]]
    long = list(range(1, 100)) * 2
    with caplog.at_level(logging.WARNING):
        found = harness._loglikelihood_tokens([good, [("a", ""), [1], []], [("a", "long"), [1], long], good])
    expected = log_likelihoods(loaded, [Pair([0, 1, 2, 3], [4, 5]), Pair([0], long[-room:])])[0]
    assert found[0] == found[3] == pytest.approx((expected[0].log_likelihood, expected[0].greedy))
    assert found[1] == (0.0, True)
    assert found[2] == pytest.approx((expected[1].log_likelihood, expected[1].greedy))
    assert harness.odd_requests == 2
    assert "0 tokens" in caplog.text
    assert f"{len(long)} tokens" in caplog.text
    assert "'long'" in caplog.text


@pytest.mark.parametrize(
    "settings", [{"max_gen_toks": 0}, {"max_gen_toks": "many"}, {"temperature": -1, "do_sample": True}]
)
def test_odd_settings_of_the_harness_are_named(harness, settings):
    requests = [SimpleNamespace(args=("Once", one)) for one in (settings, {"max_gen_toks": 3})]
    odd, even = harness.generate_until(requests)
    assert (odd, harness.odd_requests) == ("", 1)
    assert even == harness.generate_until(requests[1:])[0]


def test_half_a_surrogate_pair_is_named(harness, loaded):
    half = SimpleNamespace(args=("half \ud83d", {"max_gen_toks": 2}))
    whole = SimpleNamespace(args=("whole", {"max_gen_toks": 2}))
    assert len(harness.generate_until([half, whole])) == 2
    assert harness.odd_requests == 1
    with pytest.raises(TextError, match="surrogate"):
        encode(loaded.tokenizer, "half \ud83d")
    item = Item(contexts=("half \ud83d",) * 2, choices=(" a", " b"), gold=0)
    with pytest.raises(TaskError, match=r"item 0, choice 0.*surrogate"):
        score(loaded, Task(name="odd", items=(item,)))


@pytest.mark.parametrize("choices", [["", "early"], ["early", "  "], ["\u3000", "x"], ["\t\n"]])
def test_an_empty_choice_names_its_line(tmp_path, choices):
    file = tmp_path / "q.jsonl"
    rows = [
        {"query": "The ferry", "choices": ["left", "came"], "gold": 0},
        {"query": "q", "choices": choices, "gold": 0},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match=r"line 2: choice \d of .* is empty"):
        task_file(file)


def test_true_is_no_index(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"query": "q", "choices": ["a", "b"], "gold": True}))
    with pytest.raises(TaskError, match="gold True"):
        task_file(file)


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:99", "meta", "", "cpu:7", "mps:4", "xpu", "tpu v4"])
def test_a_device_that_is_not_there(name, finished):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match=r"must be one of cpu"):
        load_model(finished(), device=name)
    assert usable_device("cpu") == torch.device("cpu")


def test_an_export_is_evaluated_on_its_own_corpus(corpus, finished, tmp_path):
    from haltscale.platform.corpora.prepare import prepare

    prepared = prepare(corpus(vocab_size=260), 16)
    folder = finished()
    text = json.loads((prepared.folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(text, indent=3))  # the same but for white space
    original = load_model(folder)
    assert open_corpus(prepared.folder, original).rows == prepared.rows
    exported = load_model(export(original, tmp_path / "out"))
    assert open_corpus(prepared.folder, exported).rows == prepared.rows
    text["model"]["merges"] = text["model"]["merges"][:-1]
    (prepared.folder / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(EvaluationError, match="different tokenizer"):
        open_corpus(prepared.folder, original)
