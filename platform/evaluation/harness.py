"""An adapter for lm-evaluation-harness (extra ``harness``): its tasks, scored by a haltscale model.

    from lm_eval import simple_evaluate
    from haltscale.platform.evaluation.harness import HaltscaleLM

    simple_evaluate(model=HaltscaleLM(load_model(folder)), tasks=["piqa"], num_fewshot=0)

Its standard tasks fetch their data from a network; a YAML of one's own with ``dataset_path: json`` reads a local file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from haltscale.model.generation import Sampling, generate
from haltscale.platform.evaluation.scoring import Pair, Scored, log_likelihoods, pair_problem
from haltscale.platform.inference.models import LoadedModel, TextError, encode
from haltscale.platform.inference.text_generation import MAX_CACHE_BYTES

log = logging.getLogger(__name__)


class HaltscaleLM(TemplateLM):
    """A loaded model behind the harness's interface. Every text begins with end-of-text, as in training."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.loaded = loaded
        self.odd_requests = 0
        """Requests that could not be answered as given; each was named in a warning."""

    @property
    def eot_token_id(self) -> int:
        return self.loaded.end_of_text

    @property
    def max_length(self) -> int:
        return self.loaded.model.config.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """Tokens of a text, without end-of-text; none, and a warning, where the text cannot be encoded."""
        try:
            return encode(self.loaded.tokenizer, string, self.eot_token_id)
        except TextError as error:
            self._left_out(string, str(error))
            return []

    def _left_out(self, what: object, why: str) -> None:
        """Log a request that cannot be answered as given: one of thousands does not end an evaluation."""
        self.odd_requests += 1
        log.warning("a request cannot be answered as given, %s: %.200r", why, what)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        """Of continuations. As the harness's own adapters do, one that is longer than the context is scored by its last
        tokens; an empty one is certain (0 nats). Both are named."""
        end, room = self.eot_token_id, self.max_length
        pairs: list[Pair] = []
        for texts, context, own in requests:
            pair = Pair(context if context[:1] == [end] else [end, *context], own)
            if problem := pair_problem(self.loaded, pair):
                self._left_out(texts, problem)
                pair = Pair([end], own[-room:])
            pairs.append(pair)
        continued = [pair for pair in pairs if pair.continuation]
        scored = iter(log_likelihoods(self.loaded, continued)[0])
        answers = (next(scored) if pair.continuation else Scored(0.0, True) for pair in pairs)
        return [(one.log_likelihood, one.greedy) for one in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, read in windows of the context's length that each start afresh (as validation is)."""
        room = self.max_length
        cut: list[list[Pair]] = []
        for request in requests:
            text = [self.eot_token_id, *self.tok_encode(request.args[0])]
            starts = range(0, len(text) - 1, room)
            cut.append([Pair(text[start : start + 1], text[start + 1 : start + 1 + room]) for start in starts])
        scored, _ = log_likelihoods(self.loaded, [pair for pairs in cut for pair in pairs])
        likelihoods = iter(scored)
        return [sum(next(likelihoods).log_likelihood for _ in pairs) for pairs in cut]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, end-of-text, or the room that the context leaves."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, prompt: str, settings: dict[str, Any]) -> str:
        until: Sequence[str] = settings.get("until") or ()
        until = [until] if isinstance(until, str) else until
        try:
            wanted = int(settings.get("max_gen_toks", 256))
            temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        except (TypeError, ValueError, OverflowError) as error:
            self._left_out(prompt, str(error))
            return ""
        sampling = Sampling(temperature=temperature)
        if wanted < 1 or sampling.problems():
            self._left_out(prompt, "; ".join([*sampling.problems(), *([f"max_gen_toks = {wanted}"] * (wanted < 1))]))
            return ""
        text = [self.eot_token_id, *self.tok_encode(prompt)]
        room = max(self.max_length - min(wanted, self.max_length // 2), 1)
        text = text[-room:]  # as the harness does: a prompt that is too long loses its beginning
        written: list[int] = []
        for one in generate(
            self.loaded.model,
            [text],
            new_tokens=min(wanted, self.max_length + 1 - len(text)),
            sampling=sampling,
            stop_tokens={self.eot_token_id},
            max_cache_bytes=MAX_CACHE_BYTES,
        ):
            written.append(one.token)
            said: str = self.loaded.tokenizer.decode(written)
            if found := [said.index(stop) for stop in until if stop in said]:
                return said[: min(found)]
        return str(self.loaded.tokenizer.decode(written))
