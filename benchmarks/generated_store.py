"""A run store of generated numbers, as large as asked for: to measure and to look at the dashboard, never a result.

python benchmarks/generated_store.py FOLDER [--runs 1000] [--events 10000000]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from haltscale.platform.evaluation.halting_summary import summarise_halting
from haltscale.platform.evaluation.telemetry import METADATA, ROW_GROUP, EventsFile, build_cube, write_cube
from haltscale.platform.evaluation.token_kinds import TokenClass
from haltscale.platform.store import SCHEMA_VERSION

SIZES = {"0.6m": 6e5, "1.8m": 1.8e6, "4m": 4.2e6, "8m": 8.4e6, "17m": 1.7e7, "35m": 3.5e7}
BUDGETS = (3e15, 1.2e16, 5e16, 2e17)
"""Training FLOPs of a model that does not think."""
PHI = {"vanilla": 0.0, "adaptive": 0.42, "fixed": 0.25, "shuffled": 0.2, "looped": 0.3}
CONTEXT = 1024
PROSE = (
    "Fellow citizens of the Senate and of the House of Representatives : among the vicissitudes incident to life no "
    "event could have filled me with greater anxieties than that of which the notification was transmitted to me"
)
ROWS = 200
"""Logged training steps of a run."""


def points(count: int) -> list[dict[str, Any]]:
    """Runs until there are enough: methods over sizes and budgets, the adaptive ones over their options, then seeds."""
    found: list[dict[str, Any]] = []
    for seed in itertools.count():
        for size, budget in itertools.product(SIZES, BUDGETS):
            shared = {"size": size, "tokens": int(budget / (6 * SIZES[size])), "seed": seed}
            found += [{"method": name, "options": {}, **shared} for name in ("vanilla",)]
            found += [{"method": name, "options": {"steps": 3}, **shared} for name in ("fixed", "looped")]
            for lam, beta, l_max in itertools.product((0.01, 0.03, 0.1, 0.3, 1.0), (0.5, 1.0), (2, 3)):
                options = {"lam": lam, "beta": beta, "l_max": l_max, "tau": 0.01}
                found.append({"method": "adaptive", "options": options, **shared})
            found.append(
                {"method": "shuffled", "options": {"lam": 0.1, "beta": 1.0, "l_max": 3, "tau": 0.01}, **shared}
            )
            if len(found) >= count:
                return found[:count]
    return found


def mean_steps(point: dict[str, Any], progress: float = 1.0) -> float:
    """Latent steps per token: fewer with lam and with training."""
    options = point["options"]
    if "lam" not in options:
        return float(options.get("steps", 0))
    thrift = progress * math.log10(1 + 30 * options["lam"]) * (1.3 - 0.4 * options["beta"])
    return float(options["l_max"] / (1 + thrift))


def histogram(point: dict[str, Any], progress: float) -> list[float]:
    """Shares of tokens with 0..l_max latent steps."""
    most = int(point["options"].get("l_max", point["options"].get("steps", 0)))
    mean = mean_steps(point, progress)
    if "lam" not in point["options"] or most == 0:
        return [float(step == most) for step in range(most + 1)]
    share = mean / most
    return [math.comb(most, k) * share**k * (1 - share) ** (most - k) for k in range(most + 1)]


def loss_of(point: dict[str, Any], progress: float = 1.0) -> float:
    """A law with a phi per method, plus what is still to be learned."""
    size, seen = SIZES[point["size"]], max(progress, 1e-3) * point["tokens"]
    once, recurrent = 0.3 * size, 0.7 * size
    effective = once + recurrent * (1 + mean_steps(point, progress)) ** PHI[point["method"]]
    return 1.75 + 60 * effective**-0.3 + 900 * seen**-0.34


def write_run(
    folder: Path, study: str, key: str, point: dict[str, Any], random: np.random.Generator, logged: int = ROWS
) -> None:
    """A finished run, as a trainer would have left it, without weights.

    Args:
        logged: training steps; five of them with an evaluation, or all where they are fewer.
    """
    folder.mkdir(parents=True)
    identity = {**point, "context": CONTEXT, "batch_tokens": 65536, "learning_rate": 3e-3}
    symbols = {"lam": "λ", "beta": "β", "l_max": "l_max"}
    options = [f"{symbol} {point['options'][name]:g}" for name, symbol in symbols.items() if name in point["options"]]
    label = " · ".join([point["method"], point["size"], *options])
    noise = float(random.normal(0, 0.004))
    steps = point["tokens"] // 65536
    rows = [row(point, (index + 1) / logged, noise, steps, random) for index in range(logged)]
    every = max(logged // 5, 1)
    evaluations = [
        {
            **rows[index],
            "split": "validation",
            "loss_standard_error": 0.006,
            "perplexity": math.exp(rows[index]["loss"]),
        }
        for index in range(every - 1, logged, every)
    ]
    result = evaluations[-1]
    write(
        folder / "spec.json",
        {"label": label, "study": study, "key": key, "identity": identity, "execution": {"workers": 4}},
    )
    write(
        folder / "status.json",
        {"state": "finished", "step": steps, "steps": steps, "heartbeat": time.time(), "error": None},
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evaluations))
    size = SIZES[point["size"]]
    groups = {"embedding": 0.15 * size, "head": 0.15 * size, "attention": 0.25 * size, "mlp": 0.45 * size, "norms": 0.0}
    mean = result["mean_steps"]
    write(
        folder / "record.json",
        {
            "label": label,
            "study": study,
            "key": key,
            "identity": identity,
            **{name: result[name] for name in result if name not in ("step", "split", "time", "seconds")},
            "steps": steps,
            "tokens": point["tokens"],
            "parameters": groups,
            "parameters_total": size,
            "passes_per_token": 1 + mean,
            "inference_flops_per_token": {
                "realised": 2 * size * (1 + mean),
                "executed": 2.2 * size * (1 + mean),
                "paper": 2 * size,
            },
            "halting": {"well_predicted_mean_steps": 0.6 * mean, "badly_predicted_mean_steps": 1.2 * mean},
            "wall_seconds": 900.0 * (1 + mean),
            "versions": {"haltscale": "generated"},
            "git_commit": "generated",
            "machine": {"cpu": "generated"},
            "finished_at": time.time(),
        },
    )


def row(
    point: dict[str, Any], progress: float, noise: float, steps: int, random: np.random.Generator
) -> dict[str, Any]:
    """A row of metrics at a point of the training."""
    shares, tokens = histogram(point, progress), progress * point["tokens"]
    mean = sum(step * share for step, share in enumerate(shares))
    flops = 6 * SIZES[point["size"]] * tokens * (1 + mean)
    loss = loss_of(point, progress) * math.exp(noise)
    return {
        "step": round(steps * progress),
        "tokens": round(tokens),
        "loss": loss,
        "cross_entropy": loss,
        "bits_per_byte": loss / math.log(2) / 4.2,
        "mean_steps": mean,
        "expected_steps": 0.9 * mean,
        "steps_histogram": shares,
        "flops_realised": flops,
        "flops_executed": 1.15 * flops,
        "flops_paper": 0.92 * flops,
        "straggling": 1 + (0.08 * abs(random.normal()) if "lam" in point["options"] else 0.0),
        "tokens_per_second": 9e5 / (1 + mean) * (1 + random.normal(0, 0.02)),
        "grad_norm": 0.4,
        "seconds": 900 * progress * (1 + mean),
        "time": time.time(),
    }


def write_telemetry(folder: Path, point: dict[str, Any], step: int, tokens: int, random: np.random.Generator) -> None:
    """Events, cube and summary of a held-out split, and a probe, where harder and rarer tokens think longer."""
    most = int(point["options"]["l_max"])
    nll = random.gamma(1.6, 2.2, tokens).astype(np.float32)
    frequency = np.clip(random.poisson(nll), 0, 9).astype(np.uint8)
    steps = random.binomial(most, np.clip(0.12 * nll + 0.1, 0, 0.95)).astype(np.uint8)
    reach = np.cumprod(np.clip(random.normal(0.7, 0.1, (tokens, most + 1)), 0.05, 0.99), axis=1)
    reach[:, 0] = 1
    reach *= np.arange(most + 1) <= steps[:, None]
    exits = (reach - np.c_[reach[:, 1:], np.zeros(tokens)]).astype(np.float16)
    by_step: list[list[float] | None] = [None] * tokens
    for index in range(0, tokens, max(tokens // 5_000, 1)):
        better = np.arange(int(steps[index]), -1, -1) * random.normal(0.05, 0.08)
        by_step[index] = (nll[index] + better).astype(np.float32).tolist()
    looks = [str(look) for look in TokenClass]
    confidence = np.exp(-0.6 * nll).astype(np.float16)
    columns = {
        "document": (np.arange(tokens) // 4_000).astype(np.uint32),
        "position": (np.arange(tokens) % 4_000).astype(np.uint32),
        "token_id": random.integers(0, 4096, tokens).astype(np.int32),
        "steps": steps,
        "expected_steps": (exits.astype(np.float32) @ np.arange(most + 1)).astype(np.float16),
        "exit": pa.FixedSizeListArray.from_arrays(exits.ravel(), most + 1).cast(pa.list_(pa.float16())),
        "nll": nll,
        "entropy": (0.8 * nll).astype(np.float16),
        "confidence": confidence,
        "correct": random.random(tokens) < confidence,
        "frequency": frequency,
        "token_class": pa.DictionaryArray.from_arrays(random.integers(0, len(looks), tokens).astype(np.int8), looks),
        "nll_by_step": pa.array(by_step, type=pa.list_(pa.float32())),
        "entropy_by_step": pa.array(by_step, type=pa.list_(pa.float32())),
    }
    halting = folder / "halting"
    halting.mkdir(exist_ok=True)
    metadata = {METADATA: json.dumps({"step": step, "context": CONTEXT, "documents": []}).encode()}
    events = halting / f"events-{step:08d}.parquet"
    pq.write_table(
        pa.table(columns).replace_schema_metadata(metadata), events, compression="zstd", row_group_size=ROW_GROUP
    )
    file = EventsFile(path=events)
    edges = np.quantile(nll, np.arange(1, 10) / 10).astype(np.float32)
    cube = build_cube(file, edges)
    write_cube(cube, edges, file.metadata, halting / f"cube-{step:08d}.parquet")
    quarters = np.quantile(nll, [0.25, 0.75]).astype(np.float32)
    write(halting / f"summary-{step:08d}.json", summarise_halting(file, cube, quarters=quarters, l_max=most))
    write_probe(halting / f"probe-{step:08d}.parquet", most, random)


def write_probe(path: Path, most: int, random: np.random.Generator) -> None:
    """Some words with their steps."""
    words = [f" {word}" for word in PROSE.split()]
    nll = random.gamma(1.5, 2.0, len(words))
    steps = random.binomial(most, np.clip(0.12 * nll + 0.1, 0, 0.95))
    reach = [[0.7**k * (k <= taken) for k in range(most + 1)] for taken in steps]
    exits = [[r[k] - (r[k + 1] if k < most else 0) for k in range(most + 1)] for r in reach]
    gains = random.normal(0.05, 0.1, len(words))
    by_step = [
        [max(loss + gain * (taken - k), 0.0) for k in range(taken + 1)]
        for loss, taken, gain in zip(nll, steps, gains, strict=True)
    ]
    frame = {"position": range(len(words)), "token_id": range(len(words)), "text": words, "steps": steps, "nll": nll}
    expected = [sum(k * mass for k, mass in enumerate(row)) for row in exits]
    more = {"expected_steps": expected, "reach": reach, "exit": exits, "nll_by_step": by_step}
    pd.DataFrame(frame | more).to_parquet(path)


def write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps({"schema": SCHEMA_VERSION, **document}))


def generate(
    root: Path, *, runs: int, events: int = 0, telling: int = 10, study: str = "generated", logged: int = ROWS
) -> list[str]:
    """Write a study of finished runs; returns their keys.

    Args:
        logged: training steps of each run.
        events: held-out tokens with telemetry, in all.
        telling: adaptive runs that share them.
    """
    random = np.random.default_rng(0)
    keys: list[str] = []
    told = 0
    for index, point in enumerate(points(runs)):
        keys.append(f"{point['method']}-{point['size']}-{index:05d}")
        write_run(root / study / keys[-1], study, keys[-1], point, random, logged)
        if events and told < telling and point["method"] == "adaptive":
            told += 1
            write_telemetry(root / study / keys[-1], point, point["tokens"] // 65536, events // telling, random)
    write(
        root / study / "study.json",
        {
            "name": study,
            "question": "Generated numbers: how does the dashboard look and how fast is it?",
            "corpus": {"name": "generated", "validation_tokens": 90_000},
            "runs": keys,
            "planned_at": time.time(),
        },
    )
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--logged", type=int, default=ROWS, help="training steps with metrics of each run")
    options = parser.parse_args()
    keys = generate(options.folder, runs=options.runs, events=options.events, logged=options.logged)
    print(f"{len(keys)} runs in {options.folder}; HALTSCALE_STORE={options.folder} haltscale dashboard")


if __name__ == "__main__":
    main()
