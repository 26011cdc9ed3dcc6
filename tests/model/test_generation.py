"""Generation with a cache against reading the whole text again for every token; batches against single prompts."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haltscale.model import METHODS, AdaptiveOptions, Method, Shape
from haltscale.model.generation import Cost, GenerationError, Sampling, cache_bytes, choose, generate

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]
DEEPER = Shape(layers=3, d=16, heads=4, kv_heads=2, ffn=24)
EXACT = [Method.VANILLA, Method.ADAPTIVE, Method.FIXED, Method.SHUFFLED, Method.LOOPED, Method.PONDER3, Method.PAUSE]
"""Methods whose decoding equals `forward`. PonderLM-2's does not by design, and mor has a rule of its own."""


def build(tiny: Callable, method: Method):
    options = None if method is Method.ADAPTIVE else METHODS[method].options()
    return tiny(method, options).eval()


def written(model, prompts, new_tokens=6, **more):
    texts: list[list] = [[] for _ in prompts]
    for one in generate(model, prompts, new_tokens=new_tokens, **more):
        texts[one.sequence].append(one)
    return texts


@torch.no_grad()
def without_cache(model, prompt, new_tokens):
    """Greedy, the whole text read again for every token; its halting is the teacher-forced one."""
    text, steps, losses = list(prompt), [], []
    for _ in range(new_tokens):
        output = model(torch.tensor([text]), return_logits=True)
        log_p = output.logits_BTV[0, -1].log_softmax(0)
        text.append(int(log_p.argmax()))
        steps.append(int(output.trace.steps_BT[0, -1]))
        losses.append(-float(log_p.max()))
    return text[len(prompt) :], steps, losses


@pytest.mark.parametrize("method", EXACT)
def test_with_cache_equals_without_and_batch_equals_single(tiny: Callable, method: Method):
    model = build(tiny, method)
    together = written(model, PROMPTS)
    for prompt, emitted in zip(PROMPTS, together, strict=True):
        tokens, steps, losses = without_cache(model, prompt, 6)
        assert [one.token for one in emitted] == tokens
        assert [one.steps for one in emitted] == steps
        assert [one.nll for one in emitted] == pytest.approx(losses, abs=1e-9)
        [alone] = written(model, [prompt])
        assert [one[1:3] for one in alone] == [one[1:3] for one in emitted]


@pytest.mark.parametrize("method", [m for m in Method if m not in EXACT])
def test_batch_equals_single_where_decoding_is_its_own(tiny: Callable, method: Method):
    model = tiny(method, METHODS[method].options(), shape=DEEPER).eval()
    for prompt, emitted in zip(PROMPTS, written(model, PROMPTS), strict=True):
        [alone] = written(model, [prompt])
        assert [one[1:3] for one in alone] == [one[1:3] for one in emitted]


def test_sampling_is_seeded_and_each_sequence_has_its_own_stream(tiny: Callable):
    model = build(tiny, Method.ADAPTIVE)
    hot = Sampling(temperature=2.0, seed=3)
    first, again = (written(model, [[1, 2]] * 3, 12, sampling=hot) for _ in range(2))
    assert first == again
    tokens = [[one.token for one in text] for text in first]
    assert tokens[0] != tokens[1] != tokens[2]
    assert [one.token for one in written(model, [[1, 2]], 12, sampling=hot)[0]] == tokens[0]
    other = written(model, [[1, 2]] * 3, 12, sampling=Sampling(temperature=2.0, seed=4))
    assert [[one.token for one in text] for text in other] != tokens


def test_stop_tokens_end_a_sequence_and_not_the_others(tiny: Callable):
    model = build(tiny, Method.ADAPTIVE)
    whole = [[one.token for one in text] for text in written(model, PROMPTS, 8)]
    stop = next(token for token in whole[0][1:] if token not in whole[0][:1])
    cut = [[one.token for one in text] for text in written(model, PROMPTS, 8, stop_tokens=[stop])]
    for before, after in zip(whole, cut, strict=True):
        assert after == (before[: before.index(stop) + 1] if stop in before else before)


@pytest.mark.parametrize("method", list(Method))
def test_a_finished_sequence_costs_nothing(tiny: Callable, method: Method):
    """Several prompts that end one after another cost what each costs alone: tokens, FLOPs and steps."""
    options = None if method is Method.ADAPTIVE else METHODS[method].options()
    model = tiny(method, options, shape=DEEPER).eval()
    alone, total, flops = [], 0, 0.0
    for index, prompt in enumerate(PROMPTS):
        cost = Cost()
        # a sequence ends at its second, third, .. written token; sequences of a call that is greedy are as if alone
        alone.append(list(generate(model, [prompt], new_tokens=2 + 3 * index, cost=cost)))
        total, flops = total + cost.tokens, flops + cost.flops_realised
    together, unwanted = Cost(), set[int]()
    written: list[list] = [[] for _ in PROMPTS]
    for one in generate(model, PROMPTS, new_tokens=20, cost=together, unwanted=unwanted):
        written[one.sequence].append(one)
        if len(written[one.sequence]) == 2 + 3 * one.sequence:
            unwanted.add(one.sequence)
    for own, others in zip(alone, written, strict=True):
        assert [(one.token, one.steps) for one in own] == [(one.token, one.steps) for one in others]
    assert together.tokens == total
    assert together.flops_realised == pytest.approx(flops)


def test_no_sequence_waits_for_another_that_takes_more_steps(tiny: Callable):
    """A pass goes on with every sequence, whatever the depth of its token: so many passes as the slowest one needs."""
    model = tiny(Method.ADAPTIVE, AdaptiveOptions(tau=0.3, router_bias=0.0)).eval()
    for router in model.latent_loop.routers:
        torch.nn.init.normal_(router.score.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    prompts, passes = [[3], [9], [2], [7]], [0]
    model.latent_loop.stack.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    steps: list[list[int]] = [[] for _ in prompts]
    for one in generate(model, prompts, new_tokens=20):
        steps[one.sequence].append(one.steps)
    assert {0, 3} <= {k for own in steps for k in own}, "the sequences are to differ in depth"
    read_at_once = max(own[0] + 1 for own in steps)
    alone = [sum(1 + k for k in own[1:]) for own in steps]
    together = sum(max(column) + 1 for column in zip(*(own[1:] for own in steps), strict=True))
    assert passes[0] == read_at_once + max(alone) < read_at_once + together


def test_tokens_come_as_they_are_written(tiny: Callable):
    model = build(tiny, Method.VANILLA)
    cost = Cost()
    stream = generate(model, [[1, 2, 3]], new_tokens=40, cost=cost)
    next(stream)
    assert cost.tokens == 3
    next(stream)
    assert cost.tokens == 4
    assert cost.flops_realised > 0


def test_the_cache_is_as_large_as_stated_and_never_grows(tiny: Callable, monkeypatch: pytest.MonkeyPatch):
    model = build(tiny, Method.ADAPTIVE)
    states = []
    start = model.start_decoding
    monkeypatch.setattr(model, "start_decoding", lambda *a, **k: states.append(start(*a, **k)) or states[-1])
    cost = Cost()

    def size() -> int:
        return sum(t.nbytes for ((keys, values),) in states[0].cache.memories for t in (keys, values))

    sizes = [size() for _ in generate(model, PROMPTS, new_tokens=20, cost=cost, unwanted={1})]
    held = max(sizes)
    assert sizes == sorted(sizes, reverse=True)  # it shrinks with every sequence that ends
    assert sizes[-1] < held
    assert held == cost.cache_bytes == cache_bytes(model, 3, 28)
    with pytest.raises(GenerationError, match=f"need {held:,} bytes"):
        generate(model, PROMPTS, new_tokens=20, max_cache_bytes=held - 1)
    assert len(states) == 1, "the bound is to hold before anything is set aside"
    list(generate(model, PROMPTS, new_tokens=20, max_cache_bytes=held))


@pytest.mark.parametrize(
    ("prompts", "changes", "said"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 31]], {}, "outside of 0..30"),
        ([[-1]], {}, "outside of 0..30"),
        ([[1] * 65], {}, "more than the model's context of 64"),
        ([[1] * 60], {"new_tokens": 6}, "room for 5 new ones"),
        ([[1]], {"new_tokens": 0}, "new_tokens"),
        ([[1]], {"sampling": Sampling(temperature=-1.0, top_p=0.0)}, "temperature.*\n.*top_p"),
    ],
)
def test_what_cannot_be_continued(tiny: Callable, prompts, changes, said):
    with pytest.raises(GenerationError, match=said):
        generate(build(tiny, Method.VANILLA), prompts, **({"new_tokens": 2} | changes))


def test_the_context_may_be_filled_to_the_brim(tiny: Callable):
    [text] = written(build(tiny, Method.ADAPTIVE), [[1] * 60], 5)
    assert len(text) == 5


# Choosing a token ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 8), st.floats(0.05, 1.0), st.floats(0.3, 3.0))
def test_cuts_leave_what_they_promise(seed, top_k, top_p, temperature):
    log_p = torch.randn(8, generator=torch.Generator().manual_seed(seed)).log_softmax(0)
    p = torch.softmax(log_p.double() / temperature, 0)
    order = p.argsort(descending=True)[: top_k or 8].tolist()
    kept, held = [], 0.0
    for token in order:  # the fewest that hold top_p of what top_k left
        kept.append(token)
        held += float(p[token])
        if held >= top_p * float(p[order].sum()) - 1e-12:
            break
    stream = torch.Generator().manual_seed(seed)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = {choose(log_p, sampling, stream) for _ in range(200)}
    assert drawn <= set(kept) | set(order[: len(kept) + 1])  # one more where rounding decides
    if len(kept) == 1:
        assert kept[0] in drawn


def test_drawn_shares_follow_the_distribution():
    log_p = torch.tensor([0.5, 0.3, 0.2]).log()
    stream = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(log_p, Sampling(temperature=1.0), stream) for _ in range(4000)]).bincount() / 4000
    torch.testing.assert_close(drawn, log_p.exp(), atol=0.03, rtol=0)
    drawn = torch.tensor([choose(log_p, Sampling(temperature=1.0, top_k=2), stream) for _ in range(4000)]).bincount()
    torch.testing.assert_close(drawn / 4000, torch.tensor([0.625, 0.375]), atol=0.03, rtol=0)
