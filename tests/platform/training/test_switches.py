"""Runs with the switches of loops: trained twice they are one run, and a resumed one goes on to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from haltscale.model import AdaptiveOptions, FixedOptions, LoopedOptions, Method, build_model
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import RunConfig
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps.planning import cost
from haltscale.platform.training.engine import full_weights, snapshot, start

from looping import LARGE, RUN, Listener, batches, execution_of, forget, go

SWITCHES: dict[str, Any] = {
    "injection": "norm",
    "zero_outputs": True,
    "scaled_residuals": True,
    "depth_growth": 0.7,
    "depth_curve": "sqrt",
    "gradient_passes": 2,
}
RUNS: dict[str, RunConfig] = {
    "looped": replace(RUN, method=Method.LOOPED, options=LoopedOptions(steps=2, **SWITCHES)),
    "fixed": replace(RUN, method=Method.FIXED, options=FixedOptions(steps=2, **SWITCHES)),
    "adaptive": replace(RUN, method=Method.ADAPTIVE, options=AdaptiveOptions(l_max=2, tau=0.3, **SWITCHES)),
}


@pytest.mark.parametrize(("method", "zero_stage"), [("looped", 0), ("looped", 3), ("fixed", 1), ("adaptive", 2)])
def test_a_resumed_run_goes_on_to_the_last_bit(method: str, zero_stage: int, tmp_path: Path) -> None:
    """The depth follows the budget, not the process."""
    run = replace(RUNS[method], tie_embeddings=method == "fixed", embedding_rank=8 if method == "adaptive" else 0)
    store = RunStore(tmp_path)
    execution = execution_of(run, zero_stage=zero_stage, checkpoints=3)

    def once() -> tuple[dict[str, torch.Tensor], Listener, Any]:
        checkpoints = Checkpoints(store, "study", "run")
        engine, progress = start(build_model(run.model_config(LARGE), seed=0), run, execution, checkpoints)
        listener = Listener()
        listener.at_checkpoint = lambda progress: checkpoints.write(snapshot(engine), progress.to_dict())
        stream = batches(run, progress.step)
        done, _ = go(engine, run, stream, progress, listener=listener, zero_stage=zero_stage, checkpoints=3)
        checkpoints.wait()
        return full_weights(engine), listener, done

    whole, rows, progress = once()
    depths = [round(row["passes"]) if "passes" in row else None for row in rows.rows]
    assert depths[0] is None or depths[0] == 1
    if method != "adaptive":
        spent = progress.flops_realised / progress.tokens
        priced = cost(run, LARGE)
        assert priced.expected == pytest.approx(spent, rel=0.15), "six steps are few for a mean over the budget"
        assert spent < priced.bound
    forget(str(tmp_path), 6)
    resumed, again, _ = once()
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in rows.rows[4:]]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
