"""What each step was worth, against running the model with the position really stopped there; and other halting."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from haltscale.model import AdaptiveOptions, FixedOptions, Method, Mixture, Ponder3Options, VanillaOptions, probing


@pytest.fixture
def ragged(tiny: Callable) -> Callable:
    def build(**changes):
        options = AdaptiveOptions(**{"l_max": 3, "tau": 0.25, "router_bias": 0.5} | changes)
        return tiny(Method.ADAPTIVE, options, spread=2.0).eval()

    return build


@pytest.fixture
def text(batch: Callable) -> Callable:
    """(tokens, targets, lengths) of three sequences of unequal length."""

    def draw():
        tokens, targets = batch(3, 9)
        return tokens, targets.clamp(min=0), torch.tensor([9, 4, 7])

    return draw


def everything(valid_BT: torch.Tensor) -> torch.Tensor:
    return valid_BT.flatten().nonzero().squeeze(1)


def test_surprise_against_the_plain_formulas():
    logits = torch.randn(37, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    logits[3, 4] = -torch.inf
    targets = torch.randint(0, 11, (37,), generator=torch.Generator().manual_seed(1))
    targets[0] = int(logits[0].argmax())
    log_p = logits.log_softmax(1)
    nll, entropy, confidence, correct = probing.surprise(logits, targets)
    torch.testing.assert_close(nll, F.nll_loss(log_p, targets, reduction="none").float())
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1).float())
    torch.testing.assert_close(confidence, log_p.exp().amax(1).float())
    assert correct.bool().tolist() == (log_p.argmax(1) == targets).tolist()


def test_surprise_far_from_zero_and_where_nothing_is_uncertain():
    """In float32, logits of a hundred: what is subtracted is large beside what is left."""
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3 + 100
    logits[0] = torch.full((50,), -torch.inf)
    logits[0, 7] = 100.0
    targets = logits.argmin(1)
    targets[0] = 7
    nll, entropy, confidence, _ = probing.surprise(logits, targets)
    log_p = logits.double().log_softmax(1)
    torch.testing.assert_close(nll.double(), F.nll_loss(log_p, targets, reduction="none"), atol=3e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1), atol=3e-5, rtol=0)
    assert (nll[0], entropy[0], confidence[0]) == (0, 0, 1)


@pytest.mark.parametrize("mixture", list(Mixture))
def test_after_every_step_against_really_stopping_there(ragged: Callable, text: Callable, mixture: Mixture):
    """One position at a time is told to stop after step k, all others go on as they did."""
    model = ragged(mixture=mixture)
    tokens, targets, lengths = text()
    whole = probing.read(model, tokens, targets, lengths_B=lengths)
    steps = whole.trace.steps_BT.long()
    chosen = everything(whole.trace.valid_BT)[::3]
    reading = probing.read(model, tokens, targets, lengths_B=lengths, sampled_S=chosen)
    torch.testing.assert_close(reading.nll_BT, whole.nll_BT)
    assert len(steps.unique()) > 2, "halting is not ragged: the test has lost its subject"
    for row, place in enumerate(chosen.tolist()):
        own = int(steps.flatten()[place])
        assert reading.nll_by_step_SK[row].isnan().tolist() == [k > own for k in range(4)]
        for k in range(own + 1):
            stopped = steps.flatten().clone()
            stopped[place] = k
            by_order = probing.read(model, tokens, targets, lengths_B=lengths, steps_BT=stopped.view(steps.shape))
            for found, expected in (
                (reading.nll_by_step_SK, by_order.nll_BT),
                (reading.entropy_by_step_SK, by_order.entropy_BT),
            ):
                torch.testing.assert_close(found[row, k], expected.flatten()[place], rtol=1e-4, atol=1e-5)


def test_reading_agrees_with_forward(ragged: Callable, text: Callable):
    model = ragged()
    tokens, targets, lengths = text()
    reading = probing.read(model, tokens, targets, lengths_B=lengths, sampled_S=torch.tensor([0, 1]))
    output = model(tokens, targets, lengths_B=lengths)
    valid = output.trace.valid_BT
    torch.testing.assert_close(reading.nll_BT[valid], output.nll_BT[valid])
    assert reading.trace.counts == output.trace.counts, "reading after every step must not be counted as the model's"
    assert not model.latent_loop.rules.keep_states


def test_methods_without_a_chain_have_no_steps_to_read(tiny: Callable, text: Callable):
    model = tiny(Method.VANILLA, VanillaOptions()).eval()
    tokens, targets, lengths = text()
    reading = probing.read(model, tokens, targets, lengths_B=lengths, sampled_S=torch.tensor([0]))
    assert reading.nll_by_step_SK.shape == (0, 1)
    with pytest.raises(ValueError, match="vanilla has no latent chain"), probing.rules_changed(model, tau=0.5):
        pass


def test_a_lower_maximum_depth_and_tau(ragged: Callable, text: Callable):
    model = ragged()
    tokens, targets, lengths = text()
    before = probing.read(model, tokens, targets, lengths_B=lengths)
    with probing.rules_changed(model, l_max=1):
        shallow = probing.read(model, tokens, targets, lengths_B=lengths)
    assert torch.equal(shallow.trace.steps_BT, before.trace.steps_BT.clamp(max=1))
    with probing.rules_changed(model, l_max=0):
        plain = probing.read(model, tokens, targets, lengths_B=lengths)
    assert plain.trace.counts.rows == before.trace.counts.rows[:1]
    with probing.rules_changed(model, tau=1.0):
        none = probing.read(model, tokens, targets, lengths_B=lengths)
    torch.testing.assert_close(none.nll_BT, plain.nll_BT)
    again = probing.read(model, tokens, targets, lengths_B=lengths)
    torch.testing.assert_close(again.nll_BT, before.nll_BT)
    with pytest.raises(ValueError, match="trained with 3"), probing.rules_changed(model, l_max=4):
        pass


def test_dealing_keeps_the_sum_of_every_row(ragged: Callable, text: Callable):
    model = ragged()
    tokens, targets, lengths = text()
    trace = probing.read(model, tokens, targets, lengths_B=lengths).trace
    spread = probing.spread_steps(trace.steps_BT, trace.valid_BT)
    shuffled = probing.shuffled_steps(trace.steps_BT, trace.valid_BT, torch.Generator().manual_seed(0))
    for dealt in (spread, shuffled):
        assert dealt.sum(1).tolist() == trace.steps_BT.sum(1).tolist()
        assert not dealt[~trace.valid_BT].any()
        read = probing.read(model, tokens, targets, lengths_B=lengths, steps_BT=dealt)
        assert torch.equal(read.trace.steps_BT.long(), dealt)
        assert sum(read.trace.counts.rows) == sum(trace.counts.rows)
    for row, length in enumerate(lengths.tolist()):
        assert spread[row, :length].max() - spread[row, :length].min() <= 1
        assert sorted(shuffled[row].tolist()) == sorted(trace.steps_BT[row].tolist())


def test_who_has_a_router(tiny: Callable):
    assert probing.has_router(tiny(Method.ADAPTIVE))
    assert probing.has_router(tiny(Method.PONDER3, Ponder3Options()))
    assert not any(
        map(probing.has_router, (tiny(Method.FIXED, FixedOptions()), tiny(Method.VANILLA, VanillaOptions())))
    )
