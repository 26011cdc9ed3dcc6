"""A store with plausible runs, written through RunStore. Generated numbers, for tests only: nothing here ships."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from haltscale.platform.store import RunStore

STUDY = "quick"
L_MAX = 3
SIZES = {"0.6m": 6e5, "1.8m": 1.8e6, "4.2m": 4.2e6}
TOKENS = 1_000_000
NASTY = (
    *("<script>alert(1)</script>", "\x00", "\x1b[31m", "\ufffd", "🤖", "\n", "\n\n", "\t", " ", "", "\u202eevil"),
    *("&amp;", "<b>bold</b>", "\u200b", "\u0301", "`code`", "**x**", "\r\n", "a\u00a0b"),
)
PROSE = (
    "Fellow citizens of the Senate and of the House of Representatives: Among the vicissitudes incident to life no "
    "event could have filled me with greater anxieties than that of which the notification was transmitted by your "
    "order, and received on the fourteenth day of the present month.\nOn the one hand, I was summoned by my country, "
    "whose voice I can never hear but with veneration and love, from a retreat which I had chosen with the fondest "
    "predilection."
)


class Author:
    """Writes runs in any state into one store."""

    def __init__(self, root: Path) -> None:
        self.store = RunStore(root)
        self.random = np.random.default_rng(7)

    def plan(self, runs: list[str], *, study: str = STUDY) -> None:
        self.store.write_json(
            self.store.path(study, None, "study.json"),
            {
                "name": study,
                "question": "Does a model that may think halt early on tokens it predicts well?",
                "corpus": {"name": "sotu", "train_tokens": 2_300_000, "validation_tokens": 90_000, "vocab_size": 4096},
                "runs": runs,
                "planned_at": time.time(),
            },
        )

    def begin(
        self, key: str, *, method: str = "adaptive", size: str = "1.8m", lam: float | None = 0.3, **more: Any
    ) -> None:
        study = more.pop("study", STUDY)
        options = {"lam": lam, "beta": 1.0, "l_max": L_MAX, "tau": 0.01} if method == "adaptive" else {}
        arm, identity = method, {"method": method, "size": size, "seed": more.pop("seed", 0), "tokens": TOKENS}
        if steps_from := more.pop("steps_from", None):
            arm, options = f"{method}/{steps_from}", options | {"steps_from": steps_from}
        label = f"{arm} · {size}" + (f" · λ {lam:g}" if options and lam is not None else "")
        identity |= {"context": 256, "options": options}
        spec = {"label": label, "study": study, "key": key, "identity": identity, "execution": {"workers": 2}} | more
        self.store.write_json(self.store.path(study, key, "spec.json"), spec)

    def status(self, key: str, *, state: str = "running", step: int = 0, silent: float = 0, **more: Any) -> None:
        document = {"state": state, "step": step, "steps": 400, "error": None} | more
        path = self.store.path(STUDY, key, "status.json")
        self.store.write_json(path, document)
        os.utime(path, (time.time() - silent,) * 2)

    def histogram(self, lam: float | None, progress: float) -> list[float]:
        """Fractions of tokens with 0..l_max steps: thinking falls with lam and with training."""
        if lam is None:
            return [1.0]
        weights = np.exp(-np.arange(L_MAX + 1) * (2.2 * lam**0.5 * progress - 0.6))
        return [float(weight) for weight in weights / weights.sum()]

    def numbers(self, size: str, lam: float | None, progress: float) -> dict[str, Any]:
        """What a run's telemetry says at a point of its training."""
        tokens = progress * TOKENS
        histogram = self.histogram(lam, progress)
        mean = sum(step * share for step, share in enumerate(histogram))
        loss = 3.6 + 900 / SIZES[size] ** 0.5 + 3.2 * math.exp(-5 * progress) - 0.02 * mean
        flops = 6 * SIZES[size] * tokens * (1 + mean)
        return {
            "step": round(400 * progress),
            "tokens": round(tokens),
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) / 4.2,
            "mean_steps": mean,
            "expected_steps": 0.9 * mean,
            "steps_histogram": histogram,
            "flops_realised": flops,
            "flops_executed": 1.2 * flops,
            "flops_paper": 0.9 * flops,
        }

    def train(self, key: str, *, size: str = "1.8m", lam: float | None = 0.3, progress: float = 1.0) -> None:
        """Metrics, evaluations and probes up to a point of the training."""
        points = np.linspace(progress / 60, progress, 60)
        rows = []
        for point in points:
            noise = float(self.random.normal(0, 0.05))
            row = self.numbers(size, lam, float(point))
            rows.append(
                row | {"loss": row["loss"] + noise, "tokens_per_second": 2600 + 300 * noise, "time": time.time()}
            )
        self.store.append_lines(self.store.path(STUDY, key, "metrics.jsonl"), rows)
        for point in np.arange(0.25, progress + 1e-9, 0.25):
            self.evaluate(key, size=size, lam=lam, progress=float(point))

    def evaluate(self, key: str, *, size: str, lam: float | None, progress: float) -> None:
        row = self.numbers(size, lam, progress) | {
            "split": "validation",
            "tokens_evaluated": 90_000,
            "time": time.time(),
        }
        self.store.append_lines(self.store.path(STUDY, key, "evaluations.jsonl"), [row])
        self.probe(key, step=row["step"], histogram=row["steps_histogram"])

    def probe(
        self,
        key: str,
        *,
        step: int,
        histogram: list[float],
        words: tuple[str, ...] | None = None,
        needs: tuple[int, ...] | None = None,
    ) -> None:
        pieces = list(words or [])
        for word in [] if words else PROSE.replace("\n", " \n ").split(" "):
            pieces += ["\n"] if word == "\n" else [f" {word[:5]}", *([word[5:]] if word[5:] else [])]
        most, rows = len(histogram) - 1, []
        for position, text in enumerate(pieces):
            steps = int(self.random.choice(most + 1, p=histogram))
            reach = [1.0 if k == 0 else 0.6**k * (k <= steps) for k in range(most + 1)]
            leave = [reach[k] - (reach[k + 1] if k < most else 0.0) for k in range(most + 1)]
            rows.append(
                {
                    "position": position,
                    "token_id": position,
                    "text": text,
                    "steps": steps,
                    "expected_steps": float(sum(k * mass for k, mass in enumerate(leave))),
                    "reach": reach,
                    "exit": leave,
                    "nll": float(self.random.gamma(1.5 + steps, 0.9)),
                }
            )
        path = Path(self.store.probe_path(STUDY, key, step))
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).assign(**({"need": needs} if needs else {})).to_parquet(path)

    def finish(self, key: str, *, size: str = "1.8m", lam: float | None = 0.3, **more: Any) -> None:
        row = self.numbers(size, lam, 1.0)
        mean = row["mean_steps"]
        spec = self.store.read_json(self.store.path(STUDY, key, "spec.json"))
        record = {name: spec.get(name) for name in ("label", "study", "key", "identity")} | row
        record |= {
            "steps": 400,
            "parameters_total": SIZES[size],
            "passes_per_token": 1 + mean,
            "halting": {"well_predicted_mean_steps": 0.3 * mean, "badly_predicted_mean_steps": min(1.5 * mean, L_MAX)},
            "wall_seconds": 380.0 * (1 + mean),
            "tokens_per_second": 2600 / (1 + mean),
            "versions": {},
            "finished_at": time.time(),
        }
        self.status(key, state="finished", step=400)
        self.store.write_json(self.store.path(STUDY, key, "record.json"), record | more)

    def whole_run(self, key: str, *, method: str = "adaptive", size: str = "1.8m", lam: float | None = 0.3) -> None:
        self.begin(key, method=method, size=size, lam=lam)
        self.train(key, size=size, lam=lam)
        self.finish(key, size=size, lam=lam)

    def finished_study(self) -> list[str]:
        """Vanilla and two values of lam at three sizes; returns the keys."""
        keys = []
        for size in SIZES:
            for method, lam in (("vanilla", None), ("adaptive", 0.1), ("adaptive", 1.0)):
                keys.append(f"{method}-{size}-{lam}".replace(".", "_"))
                self.whole_run(keys[-1], method=method, size=size, lam=lam)
        self.plan(keys)
        return keys

    def known_need_study(self) -> list[str]:
        """Text whose need is known: the plain model, two seeds of adaptive, its replay controls; returns the keys.

        Adaptive gives every token what it needs; its controls as many steps, blindly.
        """
        needed = {None: [1.0, 0.0, 0.0], 0: [1.0, 0.0, 0.0], 1: [0.0, 1.0, 0.0], 2: [0.0, 0.0, 1.0]}
        tokens = {None: 6000, 0: 2000, 1: 1000, 2: 1000}
        shared = [0.8, 0.1, 0.1]
        arms = {
            "plain": (None, {need: [1.0] for need in needed}, (0.1, 0.9, 0.5, 0.25)),
            "routed": ("router", needed, (0.1, 0.95, 0.9, 0.8)),
            "routed-2": ("router", needed, (0.1, 0.95, 0.7, 0.6)),
            "even": ("fixed", dict.fromkeys(needed, shared), (0.1, 0.9, 0.5, 0.3)),
            "blind": ("shuffled", dict.fromkeys(needed, shared), (0.1, 0.9, 0.5, 0.3)),
        }
        for key, (steps_from, histograms, accuracies) in arms.items():
            method, lam = ("vanilla", None) if steps_from is None else ("adaptive", 0.0)
            self.begin(key, method=method, size="0.6m", lam=lam, steps_from=steps_from, seed=int(key == "routed-2"))
            rows = [
                {
                    "need": need,
                    "tokens": tokens[need],
                    "accuracy": accuracy,
                    "loss": 3.0 * (1 - accuracy),
                    "mean_steps": float(sum(step * share for step, share in enumerate(histograms[need]))),
                    "steps_histogram": histograms[need],
                }
                for need, accuracy in zip(histograms, accuracies, strict=True)
            ]
            needy = {"tokens": 2000, "accuracy": sum(accuracies[2:]) / 2, "loss": 1.0, "mean_steps": 1.5}
            found = {
                "by_need": rows,
                "rank_correlation": {"router": 1.0, None: None}.get(steps_from, 0.0),
                "needy": needy,
            }
            words, needs = ("a>b ", "b>c ", "1?a ", "c ", "0?a ", "b "), (-1, -1, -1, 1, -1, 0)
            self.probe(key, step=400, histogram=[0.4, 0.3, 0.3], words=words, needs=needs)
            histogram = [1.0] if steps_from is None else shared
            self.finish(
                key, size="0.6m", lam=lam, need=found, steps_histogram=histogram, mean_steps=0.3 * bool(steps_from)
            )
        self.plan([*arms])
        return [*arms]

    def troubled_study(self) -> list[str]:
        """A study with a run in every state that can go wrong, beside finished ones."""
        keys = self.finished_study()
        self.begin("running", size="4.2m", lam=0.3)
        self.train("running", size="4.2m", progress=0.6)
        self.status("running", step=240, seconds_left=250.0, loss=5.1)
        self.begin("stalled", size="1.8m", lam=0.3)
        self.train("stalled", progress=0.3)
        self.status("stalled", step=120, silent=900)
        self.begin("failed", size="0.6m", lam=0.3)
        self.train("failed", size="0.6m", progress=0.5)
        self.status("failed", state="failed", step=200, error="RuntimeError: worker 1 ran out of memory at step 200")
        self.begin("diverged", size="0.6m", lam=3.0)
        self.finish("diverged", size="0.6m", lam=3.0, loss=None, perplexity=None, bits_per_byte=None)
        self.begin("capped", size="0.6m", lam=3.0)
        self.train("capped", size="0.6m", lam=3.0, progress=0.5)
        self.status("capped", state="capped", step=200, error="60 s of training are over; a higher limit resumes it")
        self.begin("apart", size="0.6m", lam=4.0)
        self.status("apart", state="diverged", step=20, error="its loss is not finite at step 20")
        self.begin("damaged", size="0.6m", lam=0.5)
        Path(self.store.path(STUDY, "damaged", "status.json")).write_text('{"schema": 1, "state": "runn')
        self.begin("newer", size="0.6m", lam=0.6)
        Path(self.store.path(STUDY, "newer", "spec.json")).write_text('{"schema": 99}')
        self.begin("silent", size="1.8m", lam=0.5)
        self.finish("silent", size="1.8m", lam=0.5)  # a result without telemetry or probes
        self.begin("planned", size="4.2m", lam=3.0)
        keys += ["running", "stalled", "failed", "diverged", "capped", "apart", "damaged", "newer"]
        keys += ["silent", "planned", "never-begun"]
        self.plan(keys)
        return keys


@pytest.fixture
def author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Author:
    """An empty store of its own, which the dashboard reads too."""
    root = tmp_path / "runs"
    monkeypatch.setenv("HALTSCALE_STORE", str(root))
    return Author(root)


@pytest.fixture
def nasty() -> tuple[str, ...]:
    """Token texts that must not disturb a page."""
    return NASTY


@pytest.fixture
def tools() -> ModuleType:
    """The screenshot script's server and browser: the browser tests drive the same ones."""
    spec = importlib.util.spec_from_file_location("screenshot", Path(__file__).with_name("screenshot.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
