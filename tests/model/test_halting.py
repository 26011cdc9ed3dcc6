"""The halting rule: the figure's example, and what holds for all gates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haltscale.model.halting import halting_step, masses


@pytest.mark.parametrize(
    ("gates", "reach", "left"),
    [
        ([0.8, 0.5, 0.5], [1, 0.8, 0.4, 0.2], [0.2, 0.4, 0.2, 0.2]),
        ([0.6, 0.0], [1, 0.6], [0.4, 0.6]),
        ([0.0], [1], [1.0]),
    ],
)
def test_the_papers_figure(gates: list[float], reach: list[float], left: list[float]) -> None:
    assert masses(gates, l_max=3, tau=1e-4)[0] == pytest.approx(reach)
    assert masses(gates, l_max=3, tau=1e-4)[1] == pytest.approx(left)


def tensor_masses(gates: list[float], l_max: int, tau: float) -> list[float]:
    """What the models do: halting_step, one state at a time."""
    reach, left = torch.ones(1, dtype=torch.float64), []
    for k in range(l_max + 1):
        gate = torch.tensor([gates[k] if k < l_max else 0.5], dtype=torch.float64)
        goes_on, share, reach = halting_step(reach, gate, tau=tau, may_go_on=k < l_max)
        left.append(float(share))
        if not goes_on:
            break
    return left


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(0, 4), st.floats(0, 1))
def test_exit_masses_sum_to_one_and_no_state_is_reached_by_tau_or_less(
    gates: list[float], l_max: int, tau: float
) -> None:
    reach, left = masses(gates, l_max=l_max, tau=tau)
    assert sum(left) == pytest.approx(1)
    assert all(mass > tau for mass in reach[1:])
    assert len(reach) == len(left) <= l_max + 1
    assert tensor_masses(gates, l_max, tau) == pytest.approx(left)
