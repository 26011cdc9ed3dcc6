"""Window hashes against the obvious comparison of windows."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from haltscale.platform.corpora import leakage

documents = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=5)


def windows(document: list[int]) -> list[tuple[int, ...]]:
    return [tuple(document[n : n + 3]) for n in range(len(document) - 2)]


@settings(deadline=None)
@given(held_out=documents, trained=documents)
def test_overlaps_against_sets_of_windows(held_out, trained):
    patch = leakage.WINDOW
    leakage.WINDOW = 3
    try:
        arrays = [np.array(each, dtype=np.uint32) for each in held_out]
        hashes = leakage.window_hashes(arrays)
        places = {int(place) for each in trained for place in leakage.found_in(np.array(each, dtype=np.uint32), hashes)}
        report = leakage.report(hashes[sorted(places)], arrays)
    finally:
        leakage.WINDOW = patch
    known = {window for each in trained for window in windows(each)}
    hits = [[window in known for window in windows(each)] for each in held_out]
    assert report["validation_windows"] == sum(map(len, hits))
    assert report["overlapping_windows"] == sum(map(sum, hits))
    assert report["overlapping_documents"] == sum(map(any, hits))


def test_the_place_of_a_window_does_not_matter():
    passage = np.random.default_rng(0).integers(0, 50000, 50)
    for before in (0, 1, 1000):
        tokens = np.concatenate([np.full(before, 7), passage])
        assert leakage.window_hash(tokens)[-1] == leakage.window_hash(passage)[0]
