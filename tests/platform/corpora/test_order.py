"""The order of sequences: a pure function that no worker count and no resumption changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haltscale.platform.corpora.order import BLOCK, Mixture, global_batches, permutation, rank_share

MASK = (1 << 64) - 1
ORDER_OF_EIGHT = [2, 5, 3, 1, 6, 7, 0, 4]


def splitmix64(x: int) -> int:
    """SplitMix64's step and finaliser, in Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_permutation(seed: int, epoch: int, rows: int) -> list[int]:
    """The Feistel network with cycle walking, one integer at a time."""
    half = 1
    while 4**half < rows:
        half += 1
    start = splitmix64((splitmix64(seed) + epoch) & MASK)
    keys = [splitmix64((start + number) & MASK) for number in range(8)]

    def network(x: int) -> int:
        left, right = x >> half, x & (2**half - 1)
        for key in keys:
            left, right = right, left ^ (splitmix64((right + key) & MASK) & (2**half - 1))
        return left << half | right

    def walk(x: int) -> int:
        x = network(x)
        return x if x < rows else walk(x)

    return [walk(x) for x in range(rows)]


def slow_sequence(seed: int, rows: int, length: int) -> list[int]:
    """The first ``length`` sequence ids of a run, epoch after epoch."""
    ids: list[int] = []
    while len(ids) < length:
        ids += slow_permutation(seed, len(ids) // rows, rows)
    return ids[:length]


def test_the_hash_is_splitmix64():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the reference implementation's first output for seed 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), rows=st.integers(1, 200))
def test_permutation_against_plain_integers(seed, epoch, rows):
    assert permutation(seed, epoch, rows).tolist() == slow_permutation(seed, epoch, rows)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), rows=st.integers(1, 3000))
def test_every_row_comes_once_per_epoch(seed, epoch, rows):
    assert sorted(permutation(seed, epoch, rows)) == list(range(rows))


@settings(deadline=None)
@given(rows=st.integers(1, 200), data=st.data())
def test_a_part_of_the_order_is_a_part_of_the_whole(rows, data):
    places = data.draw(st.lists(st.integers(0, rows - 1)))
    assert permutation(7, 3, rows, places).tolist() == [permutation(7, 3, rows)[place] for place in places]


def test_a_part_of_a_huge_corpus_costs_a_part():
    ids = permutation(0, 0, 10**15, np.arange(4096))
    assert len(set(ids.tolist())) == 4096
    assert 0 <= ids.min() < ids.max() < 10**15


def test_the_order_never_changes():
    """Written down once: another order would make every earlier run incomparable."""
    assert permutation(0, 0, 8).tolist() == slow_permutation(0, 0, 8) == ORDER_OF_EIGHT


def test_seeds_and_epochs_differ():
    orders = {tuple(permutation(seed, epoch, 64)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_rows_are_spread():
    """Each row comes about equally often in each quarter of an epoch."""
    places = np.argsort(np.stack([permutation(seed, 0, 64) for seed in range(400)]), axis=1)
    assert abs(places.mean(axis=0) - 31.5).max() < 5  # standard error 0.92


@settings(deadline=None)
@given(
    seed=st.integers(0, 5), rows=st.integers(1, 40), batch=st.integers(1, 12), first=st.integers(0, 9), data=st.data()
)
def test_batches_follow_the_epochs_without_a_gap(seed, rows, batch, first, data):
    steps = data.draw(st.integers(0, 9))
    ids = global_batches(seed=seed, mixture=Mixture((rows,)), batch=batch, first_step=first, steps=steps)
    assert ids.shape == (steps, batch)
    assert ids.ravel().tolist() == slow_sequence(seed, rows, (first + steps) * batch)[first * batch :]


@settings(deadline=None)
@given(batch=st.integers(1, 24), steps=st.integers(1, 5), data=st.data())
def test_shares_make_up_the_batch(batch, steps, data):
    world = data.draw(st.sampled_from([w for w in range(1, batch + 1) if batch % w == 0]))
    ids = global_batches(seed=1, mixture=Mixture((30,)), batch=batch, first_step=0, steps=steps)
    shares = [rank_share(ids, rank=rank, world=world) for rank in range(world)]
    assert {share.shape for share in shares} == {(steps, batch // world)}
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), ids)


def test_an_uneven_share_is_refused():
    with pytest.raises(ValueError, match="6 sequences cannot be divided evenly among 4 workers"):
        rank_share(np.zeros((1, 6), dtype=np.int64), rank=0, world=4)


# ---- segments -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=st.integers(0, 5), rows=st.integers(1, 60), segment=st.integers(1, 25), data=st.data())
def test_whole_segments_are_known_before_the_number_of_rows_is(seed, rows, segment, data):
    known = data.draw(st.integers(1, rows))
    drawable = known - known % segment
    early = global_batches(seed=seed, mixture=Mixture((known,), segment=segment), batch=1, first_step=0, steps=drawable)
    late = global_batches(seed=seed, mixture=Mixture((rows,), segment=segment), batch=1, first_step=0, steps=2 * rows)
    assert late[:drawable].tolist() == early.tolist()
    for epoch in late.reshape(2, rows):
        for first in range(0, rows, segment):
            assert sorted(epoch[first : first + segment]) == list(range(first, min(first + segment, rows)))


def test_segments_and_epochs_are_shuffled_each_in_its_own_way():
    ids = global_batches(seed=0, mixture=Mixture((300,), segment=100), batch=100, first_step=0, steps=6)
    shuffles = {tuple(each - each.min()) for each in ids}
    assert len(shuffles) == 6
    assert tuple(range(100)) not in shuffles


# ---- mixtures -------------------------------------------------------------------------------------------------------

weights_ = st.lists(st.floats(0.01, 100), min_size=2, max_size=5)


@settings(max_examples=40, deadline=None)
@given(weights=weights_, seed=st.integers(0, 9), data=st.data())
def test_a_mixture_gives_each_source_its_share_in_its_own_order(weights, seed, data):
    rows = {str(number): data.draw(st.integers(1, 300)) for number in range(len(weights))}
    mixture = Mixture.of(rows, dict(zip(rows, weights, strict=True)))
    blocks = data.draw(st.integers(1, 3))
    ids = global_batches(seed=seed, mixture=mixture, batch=64, first_step=0, steps=blocks * BLOCK // 64).ravel()
    first = 0
    for count, weight in zip(rows.values(), weights, strict=True):
        own = ids[(ids >= first) & (ids < first + count)] - first
        assert abs(len(own) - len(ids) * weight / sum(weights)) <= len(weights)
        whole, rest = divmod(len(own), count)
        for epoch in range(whole):  # every row once before any comes again
            assert sorted(own[epoch * count : (epoch + 1) * count]) == list(range(count))
        assert len(set(own[whole * count :].tolist())) == rest
        first += count


def test_a_mixture_can_be_entered_anywhere():
    mixture = Mixture.of({"a": 70, "b": 900}, {"a": 0.3, "b": 0.7})
    whole = global_batches(seed=2, mixture=mixture, batch=24, first_step=0, steps=200)
    for first in (1, 42, 43, 150):
        part = global_batches(seed=2, mixture=mixture, batch=24, first_step=first, steps=50)
        np.testing.assert_array_equal(part, whole[first : first + 50])


def test_sources_are_mixed_within_every_batch():
    mixture = Mixture.of({"a": 5000, "b": 5000}, {"a": 1, "b": 3})
    shares = (global_batches(seed=0, mixture=mixture, batch=64, first_step=0, steps=64) < 5000).mean(axis=1)
    assert 0.02 < shares.min() < shares.max() < 0.55
    assert shares.mean() == 0.25


def test_without_weights_all_rows_are_one_pool():
    assert Mixture.of({"a": 3, "b": 4}, {"a": None, "b": None}) == Mixture((7,))
    assert Mixture.of({"a": 3}, {}) == Mixture((3,))


def test_equal_sources_are_not_read_in_the_same_order():
    mixture = Mixture.of({"a": 500, "b": 500}, {"a": 1, "b": 1})
    ids = global_batches(seed=0, mixture=mixture, batch=100, first_step=0, steps=10).ravel()
    assert ids[ids < 500].tolist() != (ids[ids >= 500] - 500).tolist()
