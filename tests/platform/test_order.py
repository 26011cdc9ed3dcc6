"""The order of sequences: a pure function that no worker count and no resumption changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform.order import global_batches, permutation, rank_share

MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """SplitMix64's step and finaliser, in Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_permutation(seed: int, epoch: int, rows: int) -> list[int]:
    start = splitmix64((splitmix64(seed) + epoch) & MASK)
    return sorted(range(rows), key=lambda row: splitmix64((start + row) & MASK))


def slow_sequence(seed: int, rows: int, length: int) -> list[int]:
    """The first ``length`` sequence ids of a run, epoch after epoch."""
    ids: list[int] = []
    while len(ids) < length:
        ids += slow_permutation(seed, len(ids) // rows, rows)
    return ids[:length]


def test_the_hash_is_splitmix64():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the reference implementation's first output for seed 0


@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), rows=st.integers(1, 200))
def test_permutation_against_plain_integers(seed, epoch, rows):
    assert permutation(seed, epoch, rows).tolist() == slow_permutation(seed, epoch, rows)


def test_the_order_never_changes():
    """Written down once: another order would make every earlier run incomparable."""
    assert permutation(0, 0, 8).tolist() == slow_permutation(0, 0, 8) == [4, 0, 1, 7, 6, 2, 5, 3]


def test_seeds_and_epochs_differ():
    orders = {tuple(permutation(seed, epoch, 64)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_rows_are_spread():
    """Each row comes about equally often in each quarter of an epoch."""
    places = np.argsort(np.stack([permutation(seed, 0, 64) for seed in range(400)]), axis=1)
    assert abs(places.mean(axis=0) - 31.5).max() < 5  # standard error 0.92


@given(
    seed=st.integers(0, 5), rows=st.integers(1, 40), batch=st.integers(1, 12), first=st.integers(0, 9), data=st.data()
)
def test_batches_follow_the_epochs_without_a_gap(seed, rows, batch, first, data):
    steps = data.draw(st.integers(0, 9))
    ids = global_batches(seed=seed, rows=rows, batch=batch, first_step=first, steps=steps)
    assert ids.shape == (steps, batch)
    assert ids.ravel().tolist() == slow_sequence(seed, rows, (first + steps) * batch)[first * batch :]


@given(batch=st.integers(1, 24), steps=st.integers(1, 5), data=st.data())
def test_shares_make_up_the_batch(batch, steps, data):
    world = data.draw(st.sampled_from([w for w in range(1, batch + 1) if batch % w == 0]))
    ids = global_batches(seed=1, rows=30, batch=batch, first_step=0, steps=steps)
    shares = [rank_share(ids, rank=rank, world=world) for rank in range(world)]
    assert {share.shape for share in shares} == {(steps, batch // world)}
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), ids)


def test_an_uneven_share_is_refused():
    with pytest.raises(ValueError, match="6 sequences cannot be shared by 4 workers"):
        rank_share(np.zeros((1, 6), dtype=np.int64), rank=0, world=4)
