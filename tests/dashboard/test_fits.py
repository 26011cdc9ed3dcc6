"""Fits are made once for a set of runs, kept by it, and never served for another; a page does not wait for them."""

import os
import signal

import numpy as np
import pandas as pd
import pytest

from haltscale.dashboard import fit_jobs, fits
from haltscale.platform.analysis import LawFit, Refusal


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path))
    monkeypatch.setattr(fit_jobs, "BOOTSTRAPS", 5)


@pytest.fixture
def made(monkeypatch):
    """How often each fit was made in this process."""
    seen: list[str] = []
    for name, work in fit_jobs.FITS.items():
        monkeypatch.setitem(
            fit_jobs.FITS, name, lambda runs, x, name=name, work=work: (seen.append(name), work(runs, x))[1]
        )
    return seen


def runs(count=8, method="vanilla"):
    flops = np.geomspace(1e12, 1e15, count)
    return pd.DataFrame(
        {
            "key": [f"{method}-{index}" for index in range(count)],
            "method": method,
            "size": "1m",
            "seed": 0.0,
            "state": "finished",
            "role": "comparison",
            "loss": 2 + 50 * flops**-0.15,
            "flops_realised": flops,
        }
    )


def test_a_fit_is_made_once_and_found_again_by_a_new_server(made):
    first = fits.Fitter().get("power law", runs(), "flops_realised")
    assert isinstance(first, LawFit)
    again = fits.Fitter().get("power law", runs().sample(frac=1, random_state=1), "flops_realised")
    assert made == ["power law"], "the order of the runs does not matter"
    assert again.estimates == first.estimates


def test_other_runs_another_input_or_other_code_are_another_fit(monkeypatch, made):
    table = runs()
    known = fit_jobs.digest("power law", table, "flops_realised")
    changed = table.assign(loss=table["loss"].where(table["key"] != "vanilla-3", table["loss"] + 1e-12))
    assert fit_jobs.digest("power law", changed, "flops_realised") != known
    assert fit_jobs.digest("power law", table.iloc[1:], "flops_realised") != known
    assert fit_jobs.digest("surface", table, "flops_realised") != known
    assert fit_jobs.digest("power law", table, "flops_paper") != known
    monkeypatch.setattr(fit_jobs, "_code", lambda: "other")
    assert fit_jobs.digest("power law", table, "flops_realised") != known


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04."])
def test_a_damaged_result_is_made_anew(made, content):
    fits.Fitter().get("power law", runs(), "flops_realised")
    (path,) = fit_jobs.folder().glob("*.pickle")
    path.write_bytes(content)
    assert isinstance(fits.Fitter().get("power law", runs(), "flops_realised"), LawFit)
    assert len(made) == 2
    assert fit_jobs.kept(path.stem)[0]


def test_a_folder_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "file"))
    assert isinstance(fits.Fitter().get("power law", runs(), "flops_realised"), LawFit)


def test_the_longest_unused_results_go_first(monkeypatch):
    monkeypatch.setattr(fit_jobs, "MOST_FILES", 2)
    for place, name in enumerate("abc"):
        fit_jobs.keep(name, name)
        os.utime(fit_jobs.folder() / f"{name}.pickle", (place, place))
    fit_jobs.keep("d", "d")
    assert {path.stem for path in fit_jobs.folder().glob("*.pickle")} == {"c", "d"}


def test_a_law_that_is_not_determined_is_refused(made):
    short = fits.power_laws(pd.concat([runs(), runs(3, "looped")], ignore_index=True), "flops_realised")
    assert list(short.found) == ["vanilla"]
    assert "3 of the 6 runs" in short.refused["looped"]
    assert short.pending == []
    assert isinstance(fits.Fitter().get("power law", runs(3), "flops_realised"), Refusal), "a refusal is kept too"


def test_a_server_does_not_wait_and_the_result_is_the_same():
    server = fits.Fitter()
    server.apart = True
    first = server.get("power law", runs(), "flops_realised")
    assert isinstance(first, fits.Pending)
    assert server.left() == 1
    (future,) = server._futures.values()
    future.result(timeout=240)
    law = server.get("power law", runs(), "flops_realised")
    assert isinstance(law, LawFit)
    assert server.left() == 0
    assert law.estimates.keys() == fit_jobs.FITS["power law"](runs(), "flops_realised").estimates.keys()
    server._pool.shutdown()


def test_a_fitting_process_that_is_killed_takes_no_page_down():
    server = fits.Fitter()
    server.apart = True
    assert isinstance(server.get("power law", runs(), "flops_realised"), fits.Pending)
    for process in list(server._pool._processes.values()):
        os.kill(process.pid, signal.SIGKILL)
    (future,) = server._futures.values()
    assert future.exception(timeout=240) is not None
    assert isinstance(server.get("power law", runs(), "flops_realised"), LawFit)
