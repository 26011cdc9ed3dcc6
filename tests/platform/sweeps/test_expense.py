"""Device-hours and money of a plan, by hand; and what the command line says of them."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from haltscale.platform.config import ConfigError
from haltscale.platform.sweeps.expense import Rates, priced, summary

PLAN = pd.DataFrame(
    {
        "run": ["vanilla", "adaptive", "done", "waits"],
        "state": ["planned", "planned", "finished", "waiting"],
        "flops_expected": [3.6e18, None, 1e18, None],
        "flops_bound": [7.2e18, 7.2e18, 1e18, None],
        "memory_bytes": [1e9, 75e9, 1e9, math.nan],
    }
)


def test_hours_and_money_by_hand():
    """3.6e18 realised FLOPs at 40 % of 989 TFLOP/s; with a router, those of every latent step."""
    frame = priced(PLAN, Rates(mfu=0.4, device="H100", price=2.5))
    hours = 3.6e18 / (0.4 * 989e12) / 3600
    assert frame["device_hours"].tolist()[:2] == pytest.approx([hours, 2 * hours])
    assert frame["cost"].tolist()[:2] == pytest.approx([2.5 * hours, 5 * hours])
    assert frame["device_hours"].isna().tolist() == [False, False, False, True]
    assert frame["fits"].tolist() == ["yes", "no", "yes", ""], "75 GB are more than nine tenths of 80"
    assert "cost" not in priced(PLAN, Rates(mfu=0.4))


def test_the_summary_counts_what_is_still_to_come():
    rates = Rates(mfu=0.4, device="H100", price=2.5)
    text = summary(priced(PLAN, rates), rates)
    assert text.startswith("7.58 device-hours at 40% of an H100's 989 TFLOP/s, 19 at 2.5 an hour")
    assert "1 runs that wait for others are not in it" in text
    assert "of 1 runs whose router decides, every latent step is counted" in text
    assert "1 runs do not fit into the 80 GB of an H100" in text


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"mfu": 0.0}, "--mfu"),
        ({"mfu": 40.0}, "--mfu"),
        ({"mfu": math.nan}, "--mfu"),
        ({"mfu": 0.4, "device": "H1000"}, "must be one of H200 NVL"),
        ({"mfu": 0.4, "price": -1.0}, "--price"),
    ],
)
def test_rates_that_are_none_are_refused(stated, message):
    with pytest.raises(ConfigError, match=message):
        Rates(**stated)


def test_a_dry_run_says_what_it_will_cost(study, store, capsys):
    study().main(["--store", str(store.root), "--dry-run", "--mfu", "0.4", "--price", "2"])
    text = capsys.readouterr().out
    assert "device-hours at 40% of an H100's 989 TFLOP/s" in text
    assert "at 2 an hour" in text
    study().main(["--store", str(store.root), "--dry-run", "--mfu", "0.4", "--device", "A100", "--json"])
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert all(row["device_hours"] > 0 and row["fits"] == "yes" for row in rows)


@pytest.mark.parametrize("arguments", [["--mfu", "0.4"], ["--dry-run", "--price", "2"]])
def test_rates_without_their_purpose_are_refused(study, store, arguments, capsys):
    with pytest.raises(SystemExit):
        study().main(["--store", str(store.root), *arguments])
    assert "--mfu" in capsys.readouterr().err
