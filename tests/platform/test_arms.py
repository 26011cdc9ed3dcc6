"""What is set side by side, and which arms are controls of which."""

import pytest

from haltscale.model import StepsFrom
from haltscale.platform import arms


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        ({"method": "adaptive", "options": {"steps_from": "router"}}, "adaptive"),
        ({"method": "adaptive", "options": {"steps_from": "shuffled"}}, "adaptive/shuffled"),
        ({"method": "mor", "options": {"steps_from": "fixed"}}, "mor/fixed"),
        ({"method": "adaptive", "options": {}}, "adaptive"),
        ({"method": "adaptive", "options": None}, "adaptive"),
        ({"method": "vanilla"}, "vanilla"),
        ({"method": 5}, ""),
        ({}, ""),
    ],
)
def test_arms(identity, name):
    assert arms.arm(identity) == name


def test_replays_are_the_models():
    assert set(arms.REPLAYS) == {str(source) for source in StepsFrom} - {"router"}


def test_controls_and_old_controls():
    known = ["vanilla", "adaptive", "adaptive/fixed", "mor/shuffled", "shuffled", "fixed"]
    assert arms.controls_of("adaptive", known) == ["adaptive/fixed"]
    assert arms.controls_of("vanilla", known) == []
    assert [name for name in known if arms.is_control(name)] == ["adaptive/fixed", "mor/shuffled"]
    assert arms.shown("shuffled") == "shuffled (old control)"
    assert arms.shown("adaptive/shuffled") == "adaptive/shuffled"
