"""Evaluations spread over Ray against the same ones after one another."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from haltscale.model import AdaptiveOptions, Method, ModelConfig, Shape, build_model
from haltscale.platform import cli
from haltscale.platform.corpora.corpus import Corpus
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import Pretrained
from haltscale.platform.evaluation.evaluation_jobs import Evaluation
from haltscale.platform.evaluation.tasks import TaskError

pytestmark = pytest.mark.ray
CONTEXT = 32
TOKENIZER = Pretrained(name="bytes")


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> list[Evaluation]:
    """Of two models, on a corpus and a task, with controls and dial."""
    root = tmp_path_factory.mktemp("evaluations")
    (root / "texts").mkdir()
    for index in range(4):
        (root / "texts" / f"{index}.txt").write_text(" ".join(f"word{index * n % 7}" for n in range(60)))
    sources = {"texts": Source(path=str(root / "texts"))}
    prepared = prepare(Corpus(name="toy", sources=sources, tokenizer=TOKENIZER, validation_documents=2), CONTEXT)
    task = root / "task.jsonl"
    task.write_text("\n".join(json.dumps({"query": f"{n}", "choices": ["a", "b"], "gold": n % 2}) for n in range(4)))
    return [
        Evaluation(
            model=str(_finished(root / f"model-{seed}", seed)),
            store=str(root / "runs"),
            corpora=(str(prepared.folder),),
            tasks=(str(task),),
            controls=True,
            dial=seed == 0,
        )
        for seed in range(2)
    ]


def _finished(folder: Path, seed: int) -> Path:
    options = AdaptiveOptions(l_max=2, tau=0.25, router_bias=0.5)
    shape = Shape(layers=2, d=16, heads=2, kv_heads=2, ffn=24)
    config = ModelConfig(
        method=Method.ADAPTIVE, shape=shape, vocab_size=TOKENIZER.vocab_size, context=CONTEXT, options=options
    )
    folder.mkdir()
    save_file(build_model(config, seed=seed).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer.json").write_text(TOKENIZER.json)
    return folder


def without_times(found: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: stripped(inner) for name, inner in value.items() if name != "seconds"}
        return [stripped(inner) for inner in value] if isinstance(value, list) else value

    return [(name, stripped(result)) for name, result in found]


def test_spread_over_ray_gives_what_one_process_gives(
    connected: None, evaluations: list[Evaluation], capsys: pytest.CaptureFixture[str]
) -> None:
    from haltscale.platform.evaluation import ray_evaluate

    spread = list(ray_evaluate.spread(evaluations))
    assert [part.model for part, _ in spread] == [evaluations[0].model] * 4 + [evaluations[1].model] * 3
    for evaluation in evaluations:
        found = [result for part, results in spread if part.model == evaluation.model for result in results]
        assert without_times(found) == without_times(evaluation.results())

    arguments = ["evaluate", *(one.model for one in evaluations), "--corpus", *evaluations[0].corpora, "--json"]
    cli.main([*arguments, "--ray"])
    printed = json.loads(capsys.readouterr().out)
    for evaluation in evaluations:
        [held_out, *_] = evaluation.results()
        assert without_times(printed[evaluation.model].items()) == without_times([held_out])

    broken = replace(evaluations[0], tasks=("lambda",))
    with pytest.raises(TaskError, match=r"task must be one of lambada.*got 'lambda'"):
        list(ray_evaluate.spread([evaluations[1], broken]))
