"""The page on studies: its cells run, top to bottom; training is replaced by records, since the README's runs train."""

from __future__ import annotations

import ast
import contextlib
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from haltscale.platform import cli
from haltscale.platform.store import RunState, RunStore
from haltscale.platform.sweeps.expansion import PlanState
from haltscale.platform.sweeps.recipes import RecipeSource
from haltscale.platform.sweeps.sweep import Budget, ControlKind

from jobs import ROOT

PAGE = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")


def test_the_cells_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs haltscale[tuning]")
    from haltscale.platform import ray_connection
    from haltscale.platform.sweeps import ray_tune  # takes seconds to import

    def train(study: Any, missing: Any, store: RunStore) -> None:
        for key, entry in missing.items():
            loss = 5.0 + abs(entry.run.learning_rate - 4e-3) if study.name == "fair-arms" else 5.0
            record = {"tokens": entry.run.tokens, "flops_realised": 1e12, "passes_per_token": 2.5, "loss": loss}
            record |= {"steps_schedule": [[0, 0.1, 0.2, 0.3, 0.4]], "steps_histogram": [0.1, 0.2, 0.3, 0.4]}
            record |= {"identity": study.identity(entry.run)}
            spec = {"label": entry.label, "role": entry.role}
            store.write_json(store.path(study.name, key, "spec.json"), spec)
            record |= {"recipe": entry.recipe} if entry.recipe else {}
            store.write_json(store.path(study.name, key, "record.json"), record)

    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path))
    monkeypatch.setattr(ray_connection, "connected", lambda: contextlib.nullcontext({"CPU": 2}))
    monkeypatch.setattr(ray_tune, "run_missing", train)
    names: dict[str, Any] = {}
    shown = []
    for cell in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        *body, last = ast.parse(cell).body
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
        else:
            exec(compile(ast.Module([last], []), "cell", "exec"), names)
    plan, figure, fair_plan, fair_tuning, best = shown
    assert fair_plan["state"].tolist() == ["planned"] * 6 + ["waiting"] * 6
    assert len(fair_tuning) == 6
    assert set(names["fair"].results()["learning_rate"]) == {4e-3}
    assert sorted(plan["state"]) == ["planned"] * 3 + ["waiting"] * 8
    finished = 3 + 1 + 1 + 2 * 2  # the two subjects are given the same record: they share a dense and a wider control
    assert names["results"]["state"].tolist() == ["finished"] * finished
    assert isinstance(figure, go.Figure)
    assert sum(len(trace.x) for trace in figure.data) == finished
    assert len(best) == 12


def test_every_state_and_construct_is_on_the_page() -> None:
    for state in [*RunState, *PlanState]:
        assert f"`{state}`" in PAGE
    for name in [*Budget, *ControlKind, *RecipeSource]:
        assert name in PAGE


def test_every_verb_for_studies_is_on_the_page() -> None:
    for verb in ("run", "submit", "status", "results", "logs", "cancel", "dashboard"):
        assert verb in cli.EXAMPLES
        assert f"haltscale {verb}" in PAGE
