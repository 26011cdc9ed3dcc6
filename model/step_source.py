"""The source of latent steps: how many a token takes is decided by the method's own router, or replayed.

A replay is what a control needs (docs/controls.md): everything of its subject, the readout and its learned gates
included, but the *number* of steps comes from the subject's recorded distribution of steps at the same share of the
training budget, assigned to tokens without looking at them. No router decides anything there.

A token's draw is a hash of the seed, its position and the text up to and including it. So it is causal, it is the same
in training, in evaluation and in decoding token by token, and it depends neither on the batch's layout nor on an index
that only a training loader knows: a sequence is known by its text. The hash (splitmix64 over a sum of hashed tokens) is
as good as independent of what the text says, and of the draws at other positions.

The first tokens of a sequence are not yet text: many sequences begin alike, with end-of-text, and would all draw alike
there, which would bend the distribution. So the first `ALIKE` positions take the commonest number of steps, and the
positions up to `SETTLED` take the other numbers as much more often: over `SETTLED` positions the distribution is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from haltscale.model.config import in_range, is_number, require
from haltscale.model.decoding import DecodingState

ALIKE = 2
SETTLED = 16
EXPLORE = 1
"""Salt of the draws that choose positions to explore (adaptive.py), so that they differ from a replay's."""


class StepsFrom(StrEnum):
    """What decides how many latent steps a token takes."""

    ROUTER = "router"
    """The method's own router."""
    SHUFFLED = "shuffled"
    """A draw from the recorded distribution: the subject's histogram of steps, blind to content."""
    FIXED = "fixed"
    """The recorded mean, rounded down or up by the draw: as even as whole steps can be."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of every method with a router: its own decisions, or a replay of another run's."""

    steps_from: StepsFrom = StepsFrom.ROUTER
    """What decides how many latent steps a token takes. Gates still weigh the readout, and are trained, whatever it
    is."""
    steps_schedule: tuple[tuple[float, ...], ...] = ()
    """To replay: rows of the share of the training budget from which on a distribution holds (0 to 1, ascending), and
    its probabilities of 0, 1, ... latent steps. A row at share 1 holds for evaluation and decoding."""
    steps_seed: int = 0
    """Seed of the draws of a replay, and of those of `explore`."""

    def __post_init__(self) -> None:
        if isinstance(self.steps_schedule, list | tuple):  # lists, where it was read from JSON
            rows = tuple(tuple(row) if isinstance(row, list) else row for row in self.steps_schedule)
            object.__setattr__(self, "steps_schedule", rows)

    @property
    def follows_budget(self) -> bool:
        """Whether what a training step computes depends on the share of the budget that is spent."""
        return self.steps_from is not StepsFrom.ROUTER

    def source_problems(self, l_max: object) -> list[str]:
        """All errors of these options, for a method with so many latent steps at most."""
        found = require(
            self.steps_from in list(StepsFrom), "steps_from", self.steps_from, f"one of {', '.join(StepsFrom)}"
        )
        found += in_range("steps_seed", self.steps_seed, 0, 2**31 - 1, integer=True)
        if not isinstance(l_max, int):
            return found
        allowed = f"rows of (share, {l_max + 1} probabilities that sum to 1), shares ascending from 0 to at most 1"
        schedule = self.steps_schedule
        sound = isinstance(schedule, tuple) and all(_is_sound(row, l_max + 1) for row in schedule)
        shares = [row[0] for row in schedule] if sound else []
        sound = sound and all(a < b for a, b in pairwise(shares)) and shares[:1] in ([], [0])
        if not sound:
            return found + require(False, "steps_schedule", schedule, allowed)
        if schedule or self.steps_from is StepsFrom.ROUTER:
            return found
        return found + require(False, "steps_schedule", schedule, f"given for steps_from {self.steps_from}: {allowed}")

    def idle_source(self) -> dict[str, Any]:
        """The fields that have no effect, at their defaults (see `canonical` of the options)."""
        return {"steps_schedule": (), "steps_seed": 0} if self.steps_from is StepsFrom.ROUTER else {}


def _is_sound(row: object, states: int) -> bool:
    return (
        isinstance(row, tuple)
        and len(row) == states + 1
        and all(is_number(value) and 0 <= value <= 1 for value in row)
        and abs(sum(row[1:]) - 1) < 1e-3
    )


def level_distribution(probabilities: Sequence[float]) -> list[float]:
    """The distribution with the same mean that is spread over one whole number, or two neighbouring ones."""
    mean = sum(k * p for k, p in enumerate(probabilities)) / sum(probabilities)
    whole = min(int(mean), len(probabilities) - 1)
    level = [0.0] * len(probabilities)
    level[whole] = 1 - (mean - whole)
    if mean > whole:
        level[whole + 1] = mean - whole
    return level


class Replay:
    """Numbers of latent steps from a recorded schedule."""

    def __init__(self, options: SourceOptions):
        self.seed = options.steps_seed
        self.shares = [row[0] for row in options.steps_schedule]
        level = level_distribution if options.steps_from is StepsFrom.FIXED else list
        self.distributions = [_normalised(level(row[1:])) for row in options.steps_schedule]
        self._settled = [_before_settled(distribution) for distribution in self.distributions]

    @classmethod
    def of(cls, options: SourceOptions) -> "Replay | None":
        """The replay that the options ask for; None where the router decides."""
        return None if options.steps_from is StepsFrom.ROUTER else cls(options)

    def _row(self, share: float) -> int:
        return max(0, sum(first <= share for first in self.shares) - 1)

    def distribution(self, share: float) -> list[float]:
        """Probabilities of 0, 1, ... latent steps at a share of the budget."""
        return self.distributions[self._row(share)]

    def steps(self, tokens_BT: Tensor, share: float) -> Tensor:
        """Latent steps [B, T] of the tokens of whole sequences, at a share of the budget."""
        draws_BT, _ = draws(tokens_BT, self.seed)
        T = tokens_BT.shape[1]
        row = self._row(share)
        first = [self._at(row, t) for t in range(min(T, SETTLED))]
        table = torch.tensor([*first, *[self._at(row, SETTLED)] * (T > SETTLED)], dtype=torch.float64)
        place_T = torch.arange(T).clamp(max=SETTLED)
        edges_TK = table[place_T].to(tokens_BT.device)
        return (draws_BT[..., None] >= edges_TK).sum(2)

    def decode(self, tokens_N: Tensor, state: DecodingState, share: float, rows: list[int] | None = None) -> list[int]:
        """Latent steps of the next token of each sequence, or of some; remembers their texts in the state."""
        device, row = tokens_N.device, self._row(share)
        rows = state.everyone if rows is None else rows
        positions = [state.positions[b] for b in rows]
        if state.text is None:
            state.text = torch.zeros(state.batch, 1, dtype=torch.long, device=device)
        position_N1 = torch.tensor(positions, dtype=torch.long, device=device)[:, None]
        row_N = torch.tensor(rows, device=device)
        draws_N1, text_N1 = draws(tokens_N[:, None], self.seed, position=position_N1, text_B1=state.text[row_N])
        state.text[row_N] = text_N1
        edges = [self._at(row, t) for t in positions]
        edges_NK = torch.tensor(edges, dtype=torch.float64, device=device).view(len(rows), -1)
        steps: list[int] = (draws_N1 >= edges_NK).sum(1).tolist()
        return steps

    def read(self, tokens_BT: Tensor, lengths_B: Tensor, state: DecodingState, rows: list[int]) -> None:
        """Remember the texts of whole prompts, the beginnings of the sequences `rows`, in the state."""
        if state.text is None:
            state.text = torch.zeros(state.batch, 1, dtype=torch.long, device=tokens_BT.device)
        text_BT = hashed(tokens_BT, self.seed)
        state.text[torch.tensor(rows, device=state.text.device)] = text_BT.gather(1, lengths_B[:, None] - 1)

    def _at(self, row: int, position: int) -> list[float]:
        """Upper edges of 0, 1, ..., l_max - 1 steps in the unit interval, at a position."""
        plain = self.distributions[row]
        if position < ALIKE:
            common = plain.index(max(plain))
            chosen = [float(k == common) for k in range(len(plain))]
        else:
            chosen = self._settled[row] if position < SETTLED else plain
        edges, total = [], 0.0
        for probability in chosen[:-1]:
            total += probability
            edges.append(total if total < 1 - 1e-12 else 2.0)  # rounding must not leave a gap at the end
        return edges


def _normalised(probabilities: Sequence[float]) -> list[float]:
    total = sum(probabilities)
    return [p / total for p in probabilities]


def _before_settled(probabilities: list[float]) -> list[float]:
    """The distribution of positions `ALIKE` to `SETTLED`, after `ALIKE` positions with the commonest number."""
    common = probabilities.index(max(probabilities))
    more = SETTLED / (SETTLED - ALIKE)
    chosen = [0.0 if k == common else p * more for k, p in enumerate(probabilities)]
    chosen[common] = max(0.0, 1 - sum(chosen))
    return _normalised(chosen)


# The hash ------------------------------------------------------------------------------------------------------------


def draws(
    tokens_BT: Tensor, seed: int, *, position: int | Tensor = 0, text_B1: Tensor | None = None, salt: int = 0
) -> tuple[Tensor, Tensor]:
    """(numbers in [0, 1) [B, T] in float64, hash of the text so far [B, 1]).

    position: of the first of these tokens, or [B, 1]. text_B1: the hash of the text before them.
    """
    key_BT = _keys(tokens_BT, seed, position, salt)
    text_BT = hashed(tokens_BT, seed, position=position, salt=salt)
    if text_B1 is not None:
        text_BT = text_BT + text_B1
    bits_BT = _mixed(text_BT + key_BT)
    return _shifted(bits_BT, 11).double() * 2.0**-53, text_BT[:, -1:]


def hashed(tokens_BT: Tensor, seed: int, *, position: int | Tensor = 0, salt: int = 0) -> Tensor:
    """Hash of the text from the first to each of these tokens [B, T]: a sum, so that decoding can carry it on."""
    return _mixed(_keys(tokens_BT, seed, position, salt) + tokens_BT * _GOLDEN).cumsum(1)


def _keys(tokens_BT: Tensor, seed: int, position: int | Tensor, salt: int) -> Tensor:
    position_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) + position
    return _mixed(_mixed(position_BT * _GOLDEN + seed) + salt)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al., 2014), modulo 2^64."""
    x = (x ^ _shifted(x, 30)) * _FACTORS[0]
    x = (x ^ _shifted(x, 27)) * _FACTORS[1]
    return x ^ _shifted(x, 31)
