"""A row per run: every field of the identity, figures that odd documents cannot break, and which parameters recur."""

import json

import pytest
import torch

from haltscale.dashboard import data
from haltscale.model import METHODS, Method
from haltscale.platform import analysis, run_table
from haltscale.platform.config import RunConfig
from haltscale.platform.sweeps import report

IDENTITY = {"method": "vanilla", "size": "0.6m", "seed": 0, "tokens": 180_000, "flops": None, "options": {}}


def test_seed_noise_of_a_store_is_between_runs_of_one_learning_rate(author, store):
    for index, (rate, seed, loss) in enumerate([(1e-4, 0, 4.9), (3e-3, 0, 4.0), (3e-3, 1, 4.01)]):
        identity = IDENTITY | {"seed": seed, "learning_rate": rate}
        author.spec("x", f"run-{index}", "a run", **identity)
        author.record("x", f"run-{index}", loss=loss, identity=identity, tokens=180_000, flops_realised=1e12)
    author.plan("x", ["run-0", "run-1", "run-2"])
    frames = (report.results(store, "x"), data.analysed(data.load_study(store, "x").runs))
    for runs in frames:  # the table of the terminal, and that of the dashboard
        found = analysis.seed_noise(runs)
        assert found.deviation.value == pytest.approx(0.01 / 2**0.5)
        assert runs["learning_rate"].tolist() == [1e-4, 3e-3, 3e-3]


def test_the_planned_budget_is_a_column(author, store):
    author.spec("x", "flops", "a run", **IDENTITY | {"tokens": 0, "flops": 1e12})
    author.spec("x", "tokens", "a run", **IDENTITY)
    by_flops, by_tokens = (run_table.row(store.run("x", key)) for key in ("flops", "tokens"))
    assert (by_flops["budget"], by_flops["planned_tokens"]) == (1e12, None)
    assert (by_tokens["budget"], by_tokens["planned_tokens"]) == (None, 180_000)


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("size", ["1.8m", "4m"])
def test_what_recurs_is_what_the_model_applies_again(method, size):
    with torch.device("meta"):
        config = RunConfig(method=method, size=size, options=METHODS[method].options()).model_config(512)
        model = METHODS[method].model(config)
    groups = model.parameter_groups_count()
    stack = dict(model.named_parameters())
    shared = [
        name for name in stack if any(part in name for part in (".qkv.", ".out.", ".gate_up.", ".down.", "norm."))
    ]
    if method is Method.MOR:
        middle = [f".{block}." for block in range(1, config.shape.layers - 1)]
        shared = [name for name in shared if any(part in name for part in middle)]
    expected = sum(stack[name].numel() for name in shared)
    assert run_table.recurrent_parameters(groups, {"method": str(method)}) == expected
    assert run_table.layer_count(groups, {}) == config.shape.layers


ODD = [None, 3, "text", [1], [[]], {}, {"seed": [1]}, True, 10**400, -1, {"": None}, [None]]


@pytest.mark.parametrize(
    "field", ["identity", "halting", "parameters", "loss", "tokens", "parameters_total", "options"]
)
def test_an_odd_field_of_a_record_costs_no_row(author, store, field):
    author.plan("x", ["odd", "even"])
    author.record("x", "even", loss=3.0, identity=IDENTITY)
    for value in ODD:
        identity = IDENTITY | ({"options": value} if field == "options" else {})
        record = {"schema": 1, "loss": 3.0, "identity": identity} | ({field: value} if field != "options" else {})
        store.write_json(store.path("x", "odd", "spec.json"), {"label": value, "identity": value, "role": value})
        store.fs.pipe_file(store.path("x", "odd", "record.json"), json.dumps(record).encode())
        runs = report.results(store, "x")
        assert runs["key"].tolist() == ["odd", "even"]
        assert runs["loss"].tolist()[1] == 3.0
        runs.to_json(orient="records")
        report.show_results(runs, title="x")
        assert data.load_study(store, "x").runs["loss"].tolist()[1] == 3.0
