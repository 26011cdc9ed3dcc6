"""Workers, streaming tasks and Tune's drivers always fit together: whatever is let through leaves each its CPU."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform.config import RunConfig
from haltscale.platform.corpora.ray_data import DATA_CPUS, RESERVED_CPUS
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.sweeps.ray_tune import TRIAL_CPUS, concurrency


@given(cpus=st.integers(1, 256), workers=st.integers(1, 64), each=st.integers(1, 16))
def test_what_is_let_through_never_waits_for_itself(cpus: int, workers: int, each: int) -> None:
    """As many runs as start at once, each with its workers and its driver, and one streaming task of each still fits:
    with less, workers would wait for data that waits for a CPU, and nobody would say so."""
    execution = ExecutionConfig(workers=workers, cpus_per_worker=each)
    run = RunConfig(context=256, batch_tokens=256 * workers, tokens=256 * workers)
    problems = execution.problems([run], {"CPU": cpus})
    assert bool(problems) == (workers * each > cpus)
    if problems:
        return
    study: Any = SimpleNamespace(execution=execution)
    runs = concurrency({"CPU": cpus}, study)
    held = runs * (workers * (each - RESERVED_CPUS / workers) + TRIAL_CPUS)
    assert cpus - held >= runs * DATA_CPUS - 1e-9
