"""What a study is: a question, a corpus, a base run and what differs. Data alone; `plan.py` and `study.py` use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Self

from haltscale.platform.analysis.targets import Target
from haltscale.platform.config import ConfigError, RunConfig, apply_point
from haltscale.platform.corpora.corpus import Corpus
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.sweeps.sweep import Point, Sweep, plain_point

COMPARISON, TUNING = "comparison", "tuning"
"""Roles of a study's runs. A tuning run's settings were chosen by the held-out loss: it enters no comparison."""


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Asynchronous successive halving (ASHA, arXiv 1810.05934): at growing shares of its budget a run continues only if
    its held-out loss is among the best there. It looks at evaluations: give the execution enough of them."""

    first: float = 0.25
    """Share of the budget after which a run may be ended for the first time."""
    factor: int = 2
    """The fraction of runs that continue is 1 / this; the next check is at this multiple of the share."""


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """What to compare, on what, and how to execute it."""

    name: str
    """Names the study's folder in the store."""
    question: str
    """What the study is to answer, in a sentence."""
    corpus: Corpus
    base: RunConfig
    """What all runs share."""
    sweep: Sweep
    """What differs: points that override the base's fields and its method's options."""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    note: str = ""
    """Shown under the table of results: what these figures can and cannot say."""
    targets: tuple[Target, ...] = ()
    """What the study is to show or to reproduce, decided before any result; judged wherever results are shown."""
    role: str = COMPARISON
    """What the runs are for; in each ``spec.json`` and ``record.json``."""
    source: str = field(default="", compare=False)
    """Where the study is defined: a module, or a file's name. Set by whatever loads it."""
    halving: Halving | None = None
    """Stop bad runs early. For tuning only: in a comparison every run trains to its end."""

    @cached_property
    def vocab_size(self) -> int:
        """The corpus's, computed once: reading a large tokenizer takes long."""
        return self.corpus.vocab_size

    @cached_property
    def corpus_fingerprint(self) -> str:
        """The corpus's, computed once."""
        return self.corpus.fingerprint

    def overridden(self, assignments: Sequence[str]) -> Self:
        """This study with ``field=value`` assignments applied to the base run or the execution.

        Raises:
            ConfigError: an assignment has no known field or no readable value.
        """
        base, execution, problems = self.base, self.execution, []
        for assignment in assignments:
            name, _, text = assignment.partition("=")
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            if name in {f.name for f in fields(execution)}:
                execution = replace(execution, **{name: value})
                continue
            base, found = apply_point(base, {name: value})
            problems += [f"--set {assignment}: {problem}" for problem in found]
        if problems:
            raise ConfigError(problems)
        return replace(self, base=base, execution=execution)

    def only(self, conditions: Sequence[str]) -> Self:
        """This study with the points that fulfil all ``field=value`` conditions; controls stay with their subjects, and
        every run keeps its key.

        Raises:
            ConfigError: a condition is none, or no point fulfils them all.
        """
        wanted: list[tuple[str, str]] = []
        problems = []
        for condition in conditions:
            name, sign, text = condition.partition("=")
            if not sign:
                problems.append(f"--only {condition}: give FIELD=VALUE, such as method=vanilla")
            wanted.append((name, text))
        if problems:
            raise ConfigError(problems)

        def fulfils(point: Point) -> bool:
            return all(str(point.get(name, getattr(self.base, name, None))) == text for name, text in wanted)

        found = self.sweep.where(fulfils)
        if not len(found):
            values = {name: sorted({str(p.get(name)) for p in map(plain_point, self.sweep)}) for name, _ in wanted}
            told = "; ".join(f"{name} has {', '.join(there)}" for name, there in values.items())
            raise ConfigError([f"--only {' '.join(conditions)}: no point of the sweep is that ({told})"])
        return replace(self, sweep=found)
