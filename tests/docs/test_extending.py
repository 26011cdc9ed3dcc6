"""docs/extending.md, followed to the letter: its package is installed, and everything that it promises is tried."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import FOLDER, text

from haltscale.model import METHODS, build_model
from haltscale.platform import cli
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.corpora.corpus import RowReader
from haltscale.platform.corpora.order import global_batches
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.inference.export import export
from haltscale.platform.inference.models import load_model
from haltscale.platform.load_study import load_study
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.runs.finalize import finish
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps import planning, report
from haltscale.platform.sweeps.sweep import controls, grid
from haltscale.platform.training.engine import full_weights

from jobs import ROOT
from looping import Batch, engine_of, go

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads(re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)[0])
FILES = dict(re.findall(r"`haltscale_blend/(\w+\.py)`.*?```python\n(.*?)```", PAGE, flags=re.DOTALL))
(CHECK,) = re.findall(r"agree:\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
PACKAGE = "haltscale_blend"


def install(target: Path) -> None:
    """What `pip install` puts into a folder: the package, and the entry points of its pyproject.toml."""
    (target / PACKAGE).mkdir(parents=True)
    (target / PACKAGE / "__init__.py").touch()
    for name, source in FILES.items():
        (target / PACKAGE / name).write_text(source, encoding="utf-8")
    project = PYPROJECT["project"]
    info = target / f"{PACKAGE}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()) for group, points in groups
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


def forget() -> None:
    """Look for the entry points again, and import their modules again."""
    from haltscale.dashboard import layout

    METHODS.refresh()
    for name in ("blend", f"{PACKAGE}.method:ENTRY"):
        METHODS.pop(name, None)
    layout._other_pages.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the import path with the package in it."""
    target = tmp_path_factory.mktemp("site")
    install(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(target))
        forget()
        yield target
    forget()


@pytest.fixture(scope="module")
def cells(site: Path) -> dict[str, Any]:
    """The names of the page's checks, after they ran."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(CHECK, "cell", "exec"), names)
    return names


@pytest.fixture(scope="module")
def study(site: Path) -> Any:
    return load_study("blend-depth").study


@pytest.fixture(scope="module")
def trained(study: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of the study's, trained and evaluated without Ray, in a store."""
    corpus = prepare(study.corpus, study.base.context)
    point = next(run for run in study.runs if run.method == "blend")
    run = replace(point, tokens=20 * point.batch_tokens, precision=Precision.FP32)
    engine = engine_of(run, vocabulary=corpus.counts["vocab_size"])
    ids = global_batches(seed=0, mixture=corpus.mixture, batch=run.batch_sequences, first_step=0, steps=run.steps)
    reader = RowReader(corpus.folder)
    stream = (Batch(step, rows, reader.read(rows).astype(np.int64)) for step, rows in enumerate(ids))
    progress, listener = go(engine, run, stream)
    store = RunStore(tmp_path_factory.mktemp("store"))
    key, identity = study.key(run), study.identity(run)
    model = build_model(corpus.model_config(run), seed=0)
    model.load_state_dict(full_weights(engine))
    described = {"label": run.label, "study": study.name, "key": key, "identity": identity, "execution": {}}
    described |= {"routed": METHODS[run.method].routed}
    store.write_json(store.path(study.name, None, "study.json"), {"name": study.name, "runs": [key]})
    store.write_json(store.path(study.name, key, "spec.json"), described)
    recorder = RunRecorder(store, study.name, key, steps=run.steps)
    finish(model.eval(), model.state_dict(), corpus, run, progress, recorder, described)
    recorder.close()
    return {"store": store, "run": run, "key": key, "identity": identity, "rows": listener.rows, "model": model}


def test_the_parts_are_listed(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["list", "--json"])
    listed = json.loads(capsys.readouterr().out)
    (method,) = (row for row in listed["methods"] if row["method"] == "blend")
    assert method == {
        "method": "blend",
        "package": "haltscale-blend",
        "summary": "a learned mixture of the states of all passes",
    }
    (found,) = (row for row in listed["studies"] if row["study"] == "blend-depth")
    assert found["package"] == "haltscale-blend"
    assert found["summary"] == "Blend depth: how many passes are worth mixing, at equal training FLOPs?"


def test_training_and_decoding_agree_and_so_does_the_ledger(cells: dict[str, Any]) -> None:
    assert cells["largest_difference"] < 1e-5
    assert cells["executed"] == pytest.approx(cells["counted"], rel=0.01)


def test_prompts_are_read_as_tokens_are(cells: dict[str, Any]) -> None:
    model, tokens = cells["model"], cells["tokens_BT"]
    state = model.start_decoding(3)
    logits, _ = model.read_prompts([row.tolist() for row in tokens[:, :8]], state)
    torch.testing.assert_close(logits, cells["output"].logits_BTV[:, 7], atol=1e-5, rtol=1e-5)
    logits, _ = model.decode_step(tokens[:, 8], state)
    torch.testing.assert_close(logits, cells["output"].logits_BTV[:, 8], atol=1e-5, rtol=1e-5)


def test_the_mixture_is_learned(cells: dict[str, Any]) -> None:
    model, tokens = cells["model"], cells["tokens_BT"]
    model.zero_grad()
    model(tokens, tokens.roll(-1, 1)).loss.backward()
    assert model.weight.grad.abs().min() > 0


def test_a_sweep_of_it_is_planned_and_priced(study: Any, tmp_path: Path) -> None:
    plan = study.plan(RunStore(tmp_path))
    assert sorted(plan["method"]) == ["blend", "blend", "vanilla"]
    assert set(plan["state"]) == {"planned"}
    for run in study.runs:
        model = build_model(run.model_config(study.vocab_size), seed=0)
        tokens = torch.zeros(2, run.context, dtype=torch.long)
        with torch.no_grad():
            counts = model(tokens, tokens).trace.counts
        spent = model.flops(counts).training.realised / counts.tokens
        assert planning.cost(run, study.vocab_size).expected == pytest.approx(spent)
        assert run.tokens * spent == pytest.approx(2e9, rel=0.05)


def test_options_that_cost_nothing_are_not_priced_again(study: Any) -> None:
    run = next(run for run in study.runs if run.method == "blend")
    planning.cost(run, study.vocab_size)
    before = planning._training_flops.cache_info().misses
    planning.cost(replace(run, options=replace(run.options, sharpness=3.0)), study.vocab_size)
    assert planning._training_flops.cache_info().misses == before


def test_it_can_be_named_by_its_path(study: Any) -> None:
    named = replace(study, sweep=grid(method="haltscale_blend.method:ENTRY", steps=1))
    (run,) = named.runs
    assert named.key(run).startswith("ENTRY-1x64-")
    assert run.label.startswith("haltscale_blend.method:ENTRY")
    assert RunConfig.from_identity(named.identity(run)) == run.canonical()


def test_what_is_wrong_is_said(study: Any) -> None:
    bad = grid(method="blend", steps=40) + grid(method="blend", stepz=2) + grid(method="blond")
    told = "\n".join(replace(study, sweep=bad).problems())
    assert "options.steps = 40: must be an integer of at least 0 and at most 32" in told
    assert "blend has no 'stepz'; did you mean 'steps'?" in told
    assert "method = 'blond'; did you mean 'blend'?" in told
    learned = grid(method="blend")
    (told,) = replace(study, sweep=learned + controls(of=learned, kinds=["fixed"])).problems()
    assert "the fixed control is not for blend, since it has no router" in told


def test_it_is_trained_and_its_run_is_known_by_its_key(trained: dict[str, Any], study: Any) -> None:
    run, identity = trained["run"], json.loads(json.dumps(trained["identity"]))
    assert trained["rows"][-1]["loss"] < trained["rows"][0]["loss"] - 0.1
    assert trained["key"].startswith("blend-1x64-")
    assert RunConfig.from_identity(identity) == run
    assert study.key(replace(run, options=replace(run.options, steps=4))) != trained["key"]


def test_its_results_are_in_the_tables(trained: dict[str, Any], study: Any) -> None:
    (row,) = report.results(trained["store"], study.name).to_dict("records")
    assert (row["method"], row["state"], row["mean_steps"]) == ("blend", "finished", trained["run"].options.steps)
    assert row["loss"] < np.log(study.vocab_size)
    groups = trained["model"].parameter_groups_count()
    assert row["parameters_recurrent"] == groups["attention"] + groups["mlp"] + groups["norms"]


def test_the_dashboard_has_its_page(trained: dict[str, Any], study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamlit.testing.v1 import AppTest

    from haltscale.dashboard import data, layout

    entries = {entry["url_path"]: entry for entry in layout.pages(FOLDER / "app_pages")}
    assert entries["blend"]["title"] == "Blend"
    assert entries["blend"]["help"] == "What do the passes of a blend weigh?"
    assert list(entries)[-1] == "blend"
    assert data.load_study(trained["store"], study.name).runs["routed"].tolist() == [False]
    monkeypatch.setenv("HALTSCALE_STORE", trained["store"].root)
    page = AppTest.from_file(str(FOLDER / "app.py"), default_timeout=60).run()
    page.switch_page(str(entries["blend"]["page"])).run()
    assert not page.exception
    assert "Blend" in text(page)
    (table,) = page.dataframe
    assert table.value["label"].tolist() == [trained["run"].label]


def test_an_export_takes_its_code_along(trained: dict[str, Any], study: Any, site: Path, tmp_path: Path) -> None:
    """Loaded by a process that knows neither package."""
    folder = Path(trained["store"].path(study.name, trained["key"], "model"))
    loaded = load_model(folder)
    target = export(loaded, tmp_path / "out")
    tokens = torch.arange(9)[None] % loaded.model.config.vocab_size
    with torch.no_grad():
        expected = loaded.model(tokens).logits_BTV
    code = (
        "import json, sys, torch\n"
        "sys.modules['haltscale'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(target)!r}, trust_remote_code=True)\n"
        f"print(json.dumps(model(torch.tensor({tokens.tolist()})).logits.tolist()))\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_study_runs(site: Path, tmp_path: Path) -> None:

    environment = os.environ | {"PYTHONPATH": str(site), "HALTSCALE_HOME": str(tmp_path), "RAY_TMPDIR": "/tmp"}
    command = [
        sys.executable,
        "-m",
        "haltscale.platform.cli",
        "run",
        "blend-depth",
        "--",
        "--store",
        str(tmp_path / "store"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = report.results(RunStore(tmp_path / "store"), "blend-depth")
    assert sorted(results["method"]) == ["blend", "blend", "vanilla"]
    assert set(results["state"]) == {"finished"}
