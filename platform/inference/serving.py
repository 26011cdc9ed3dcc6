"""A completion server for one model, in the words of OpenAI's API, on loopback alone.

    haltscale serve quickstart/adaptive-0.6m
    curl http://127.0.0.1:8300/v1/completions -d '{"prompt": "The state of", "max_tokens": 20}'

``/v1/models`` and ``/v1/completions``, streamed if asked for. Beside what OpenAI has, each choice tells the latent
steps before every token (``latent_steps``), and ``usage`` their sum. What is not supported is refused, not ignored.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from haltscale.model.generation import Cost, GenerationError, Sampling
from haltscale.platform.inference.models import LoadedModel
from haltscale.platform.inference.text_generation import MAX_CACHE_BYTES, WrittenToken, write

LOOPBACK = "127.0.0.1"
PORT = 8300
AT_ONCE = 16
"""Requests that are served at a time; each may set aside a cache of its own."""
UNSUPPORTED = {"n": 1, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "logit_bias": None,
               "presence_penalty": 0, "frequency_penalty": 0}  # fmt: skip
"""Fields that are taken only with the value at which they do nothing."""
KNOWN = {"model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options"}
KNOWN |= {"user", *UNSUPPORTED}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A request, checked."""

    prompts: list[str]
    new_tokens: int
    sampling: Sampling
    stop: list[str]
    stream: bool
    include_usage: bool

    @classmethod
    def parse(cls, body: Any) -> Completion:
        """From the JSON of a request.

        Raises:
            GenerationError: with all that is wrong.
        """
        if not isinstance(body, dict):
            raise GenerationError("the body must be a JSON object")
        found = [f"{name} is not known; known: {', '.join(sorted(KNOWN))}" for name in body if name not in KNOWN]
        found += [
            f"{name} = {body[name]!r} is not supported: leave it out"
            for name, neutral in UNSUPPORTED.items()
            if body.get(name, neutral) not in (neutral, None)
        ]
        prompts = _texts(body.get("prompt"))
        stop = _texts(body.get("stop") or [])
        if not prompts:
            found.append("prompt must be a text, or a list of texts")
        if stop is None or not all(stop):
            found.append("stop must be a text, or a list of texts")
        sampling = Sampling(
            temperature=_given(body, "temperature", 1.0),
            top_k=_given(body, "top_k", 0),
            top_p=_given(body, "top_p", 1.0),
            seed=_given(body, "seed", secrets.randbelow(2**31)),
        )
        options = body.get("stream_options") or {}
        if not isinstance(body.get("stream", False), bool | None) or not isinstance(options, dict):
            found.append("stream must be true or false, stream_options an object")
        found += sampling.problems()
        if found:
            raise GenerationError("\n".join(found))
        return cls(
            prompts=prompts or [],
            new_tokens=_given(body, "max_tokens", 16),
            sampling=sampling,
            stop=stop or [],
            stream=bool(body.get("stream")),
            include_usage=bool(options.get("include_usage")),
        )


def _given(body: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if body.get(name) is None else body[name]


def _texts(value: Any) -> list[str] | None:
    texts = [value] if isinstance(value, str) else value
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None


@dataclass
class Piece:
    """What one token adds to a choice, as far as it is known not to be the beginning of a stop."""

    choice: int
    text: str
    steps: list[int] = field(default_factory=list)
    finish: str | None = None


def pieces(tokens: Iterator[WrittenToken], request: Completion, end_of_text: int) -> Iterator[Piece]:
    """Continuations up to their stops, which are left out, piece by piece; the last of each says why it ended."""
    waiting = dict.fromkeys(range(len(request.prompts)), "")  # text that may turn out to belong to a stop
    left = dict.fromkeys(waiting, request.new_tokens)
    for token in tokens:
        index = token.prompt
        if index not in waiting:  # it has met its stop; the others go on
            continue
        text = waiting[index] + token.text
        left[index] -= 1
        met = min((at for stop in request.stop if (at := text.find(stop)) >= 0), default=None)
        over = "stop" if met is not None or token.token_id == end_of_text else None if left[index] else "length"
        if over:
            del waiting[index]
            yield Piece(index, text if met is None else text[:met], [token.steps], over)
            if not waiting:
                return
        else:
            held = max((n for stop in request.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            waiting[index] = text[len(text) - held :]
            yield Piece(index, text[: len(text) - held], [token.steps])


class Server:
    """The application over one model."""

    def __init__(self, loaded: LoadedModel, name: str, *, max_cache_bytes: int = MAX_CACHE_BYTES) -> None:
        self.loaded, self.name, self._max_cache_bytes = loaded, name, max_cache_bytes
        self._began = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ],
            # A page of the web that has its own name point to loopback is not answered.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])],
        )

    async def models(self, _: Request) -> Response:
        """The one that there is."""
        one = {"id": self.name, "object": "model", "created": self._began, "owned_by": "haltscale"}
        return JSONResponse({"object": "list", "data": [one]})

    async def completions(self, asked: Request) -> Response:
        """Continue prompts."""
        try:
            body = await asked.json()
            request = Completion.parse(body)
            if body.get("model") not in (None, self.name):
                return _refused(f"no model {body['model']!r} here; there is: {self.name}", status=404)
            cost = Cost()
            tokens = write(
                self.loaded,
                request.prompts,
                new_tokens=request.new_tokens,
                sampling=request.sampling,
                max_cache_bytes=self._max_cache_bytes,
                cost=cost,
            )
        except (GenerationError, ValueError) as error:
            return _refused(str(error))
        found = pieces(tokens, request, self.loaded.end_of_text)
        answer = Answer(self.name, self._prompt_tokens(request))
        if request.stream:
            return StreamingResponse(answer.stream(found, request.include_usage), media_type="text/event-stream")
        return JSONResponse(await run_in_threadpool(answer.whole, found, len(request.prompts)))

    def _prompt_tokens(self, request: Completion) -> int:
        encoded = self.loaded.tokenizer.encode_batch(request.prompts, add_special_tokens=False)
        return sum(1 + len(one.ids) for one in encoded)  # end-of-text stands before each


def _refused(message: str, *, status: int = 400) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


class Answer:
    """The answer to one request, whole or as a stream of events."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._prompt_tokens, self._tokens, self._steps = prompt_tokens, 0, 0

    def _seen(self, found: Iterator[Piece]) -> Iterator[Piece]:
        for piece in found:
            self._tokens += len(piece.steps)
            self._steps += sum(piece.steps)
            yield piece

    @property
    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
            "latent_steps": self._steps,
        }

    def whole(self, found: Iterator[Piece], count: int) -> dict[str, Any]:
        """All choices."""
        choices = [Piece(index, "") for index in range(count)]
        for piece in self._seen(found):
            one = choices[piece.choice]
            one.text += piece.text
            one.steps += piece.steps
            one.finish = piece.finish
        return {**self._head, "choices": [_choice(one) for one in choices], "usage": self._usage}

    def stream(self, found: Iterator[Piece], include_usage: bool) -> Iterator[str]:
        """Server-sent events: a chunk for every token; the usage, if asked for; ``[DONE]``."""
        for piece in self._seen(found):
            yield _event({**self._head, "choices": [_choice(piece)]})
        if include_usage:
            yield _event({**self._head, "choices": [], "usage": self._usage})
        yield "data: [DONE]\n\n"


def _choice(piece: Piece) -> dict[str, Any]:
    return {
        "index": piece.choice,
        "text": piece.text,
        "logprobs": None,
        "finish_reason": piece.finish,
        "latent_steps": piece.steps,
    }


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


@contextlib.contextmanager
def listening(server: Server, port: int = PORT) -> Iterator[tuple[str, uvicorn.Server, socket.socket]]:
    """(its address, what runs it, the socket that it is to be run on): connections wait there from now on.

    Args:
        port: on loopback; 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """
    with socket.create_server((LOOPBACK, port)) as place:
        config = uvicorn.Config(server.app, log_level="warning", limit_concurrency=AT_ONCE)
        yield f"http://{LOOPBACK}:{place.getsockname()[1]}", uvicorn.Server(config), place
