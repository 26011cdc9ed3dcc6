r"""A completion server for one model, in the words of OpenAI's API, on loopback alone.

    haltscale serve state-of-the-union/adaptive-0.6m
    curl http://127.0.0.1:8300/v1/completions -H 'Content-Type: application/json' \
        -d '{"prompt": "The state of", "max_tokens": 20}'

``/v1/models`` and ``/v1/completions``, streamed if asked for. Beside what OpenAI has, each choice tells the latent
steps before every token (``latent_steps``), and ``usage`` their sum. What is not supported is refused, not ignored.

Whoever connects is a stranger. Bodies and prompts are bounded before anything is made of them; waiting is bounded too
(:class:`Patience`); tokenising and writing happen in threads, so that the event loop always answers; every error has
the API's JSON shape. Only the names of this machine are answered, and only JSON that says that it is JSON: so no page
of the web can ask, neither by a name of its own that points here nor by a form.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from haltscale.model.generation import GenerationError, Sampling
from haltscale.platform.inference.models import LoadedModel
from haltscale.platform.inference.text_generation import MAX_CACHE_BYTES, WrittenToken, write

LOOPBACK = "127.0.0.1"
PORT = 8300
AT_ONCE = 16
"""Completions that are written at a time; each may set aside a cache of its own. Further ones get a 503."""
MOST_BYTES = 4 << 20
"""Of a request's body."""
MOST_THROWN = 64 << 20
"""Of a body that is too long: so much is read before the connection is closed."""
MOST_PROMPTS = 128
MOST_STOPS = 16
MOST_CONNECTIONS = 512
HOSTS = (LOOPBACK, "localhost")
UNSUPPORTED = {"n": 1, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "logit_bias": None,
               "presence_penalty": 0, "frequency_penalty": 0}  # fmt: skip
"""Fields that are taken only with the value at which they do nothing."""
KNOWN = {"model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options"}
KNOWN |= {"user", *UNSUPPORTED}


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds after which somebody who says or takes nothing is hung up on."""

    headers: float = 10.0
    """From the connection to the end of a request's headers."""
    body: float = 30.0
    """From there to the end of its body."""
    idle: float = 5.0
    """Between two requests on one connection."""
    taking: float = 30.0
    """For a part of the answer."""


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
        unknown = [name for name in body if name not in KNOWN][:8]
        found = [f"{name[:40]} is not known; known: {', '.join(sorted(KNOWN))}" for name in unknown]
        found += [
            f"{name} = {repr(body[name])[:40]} is not supported: leave it out"
            for name, neutral in UNSUPPORTED.items()
            if body.get(name, neutral) not in (neutral, None)
        ]
        prompts = _texts(body.get("prompt"))
        stop = _texts(body.get("stop") or [])
        if not prompts:
            found.append("prompt must be a text, or a list of texts")
        elif len(prompts) > MOST_PROMPTS:
            found.append(f"prompt holds {len(prompts)} texts, at most {MOST_PROMPTS} are continued together")
        if stop is None or not all(stop):
            found.append("stop must be a text, or a list of texts")
        elif len(stop) > MOST_STOPS:
            found.append(f"stop holds {len(stop)} texts, at most {MOST_STOPS} are looked for")
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


def pieces(
    tokens: Iterator[WrittenToken], request: Completion, end_of_text: int, ended: set[int] | None = None
) -> Iterator[Piece]:
    """Continuations up to their stops, which are left out, piece by piece; the last of each says why it ended.

    Args:
        ended: filled in with the choices that have ended: whoever writes need not go on with them.
    """
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
            if ended is not None:
                ended.add(index)
            yield Piece(index, text if met is None else text[:met], [token.steps], over)
            if not waiting:
                return
        else:
            held = max((n for stop in request.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            waiting[index] = text[len(text) - held :]
            yield Piece(index, text[: len(text) - held], [token.steps])


class Server:
    """The application over one model."""

    def __init__(
        self,
        loaded: LoadedModel,
        name: str,
        *,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        patience: Patience | None = None,
    ) -> None:
        self.loaded, self.name, self._max_cache_bytes = loaded, name, max_cache_bytes
        self.patience = patience or Patience()
        self._began = int(time.time())
        self._writing = 0
        application = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _http_error, Exception: _own_error},
        )
        self.app = Guard(application, self.patience)

    async def models(self, _: Request) -> Response:
        """The one that there is."""
        one = {"id": self.name, "object": "model", "created": self._began, "owned_by": "haltscale"}
        return JSONResponse({"object": "list", "data": [one]})

    async def completions(self, asked: Request) -> Response:
        """Continue prompts."""
        if asked.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return _refused("send JSON, with Content-Type: application/json", status=415)
        try:
            async with asyncio.timeout(self.patience.body):
                content = await _body(asked)
        except TimeoutError:
            return _refused(f"the body did not arrive within {self.patience.body:g} s", status=408)
        if content is None:
            return _refused(f"the body is longer than {MOST_BYTES:,} bytes", status=413)
        if self._writing >= AT_ONCE:
            return _refused(f"{AT_ONCE} completions are being written: ask again in a while", status=503)
        self._writing += 1
        kept = False
        try:
            try:
                request, found, answer = await run_in_threadpool(self._begun, content)
            except UnknownModelError as error:
                return _refused(str(error), status=404)
            except (ValueError, RecursionError) as error:
                return _refused(str(error))
            if request.stream:
                kept = True
                return Events(answer.stream(found, request.include_usage), self._ended)
            return JSONResponse(await run_in_threadpool(answer.whole, found, len(request.prompts)))
        finally:
            if not kept:
                self._ended()

    def _ended(self) -> None:
        self._writing -= 1

    def _begun(self, content: bytes) -> tuple[Completion, Iterator[Piece], Answer]:
        """A checked request, and its pieces to come; what takes long, since texts are tokenised here.

        Raises:
            ValueError: it cannot be answered; the message says why.
        """
        body = json.loads(content)
        request = Completion.parse(body)
        if body.get("model") not in (None, self.name):
            raise UnknownModelError(f"no model {str(body['model'])[:80]!r}; available: {self.name}")
        ended = set[int]()
        tokens = write(
            self.loaded,
            request.prompts,
            new_tokens=request.new_tokens,
            sampling=request.sampling,
            max_cache_bytes=self._max_cache_bytes,
            unwanted=ended,
        )
        answer = Answer(self.name, self._prompt_tokens(request))
        return request, pieces(tokens, request, self.loaded.end_of_text, ended), answer

    def _prompt_tokens(self, request: Completion) -> int:
        return sum(1 + len(ids) for ids in self.loaded.encode(request.prompts))  # end-of-text stands before each


class UnknownModelError(ValueError):
    """Another model is asked for than the one that is served."""


class Events(StreamingResponse):
    """Server-sent events, and what is to be done when they have ended or are no longer wanted."""

    def __init__(self, lines: Iterator[str], ended: Callable[[], None]) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


class NotTakenError(OSError):
    """Nobody takes the answer."""


async def _body(asked: Request) -> bytes | None:
    """The body of a request; None where it is too long. What is too long is read on for a while and thrown away: who
    still sends does not hear an answer."""
    announced = asked.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > MOST_THROWN:
        return None
    parts, length = [], 0
    async for part in asked.stream():
        length += len(part)
        if length > MOST_THROWN:
            break
        if length <= MOST_BYTES:
            parts.append(part)
    return b"".join(parts) if length <= MOST_BYTES else None


def _refused(message: str, *, status: int = 400) -> Response:
    whose = "invalid_request_error" if status < 500 else "server_error"
    kept = message.encode("utf-8", "replace").decode()  # what was sent may not be text that can be sent back
    error = {"message": kept, "type": whose, "param": None, "code": None}
    headers = {"Retry-After": "1"} if status == 503 else {"Connection": "close"} if status in (408, 413) else None
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refused(f"{error.detail}: there are GET /v1/models and POST /v1/completions", status=error.status_code)


async def _own_error(_: Request, error: Exception) -> Response:
    """A fault of ours: its traceback goes to the log."""
    return _refused(f"the server failed: {type(error).__name__}; its log says where", status=500)


class Guard:
    """Around the application: who is answered, and for how long somebody may take to listen."""

    def __init__(self, app: ASGIApp, patience: Patience) -> None:
        self._app, self._patience = app, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if host.rsplit(":", 1)[0] not in HOSTS:
            known = " and ".join(HOSTS)
            await _refused(f"the host {host[:80]!r} is not this machine: {known} are answered")(scope, receive, send)
            return

        async def patiently(message: Message) -> None:
            try:
                async with asyncio.timeout(self._patience.taking):
                    await send(message)
            except TimeoutError as error:
                raise NotTakenError from error

        with contextlib.suppress(ClientDisconnect, NotTakenError):
            await self._app(scope, receive, patiently)


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


def _protocol(patience: Patience) -> type[H11Protocol]:
    """uvicorn's HTTP, with a bound on how long a connection may say nothing, and with errors in the API's shape."""

    class Protocol(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > MOST_CONNECTIONS:
                transport.close()
            else:
                self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._waiting is None:  # the beginning of a further request
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            body = bytes(_refused(msg).body)
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                if output := self.conn.send(event):
                    self.transport.write(output)
            self.transport.close()

        def _wait(self) -> None:
            self._waiting = self.loop.call_later(patience.headers, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return Protocol


@contextlib.contextmanager
def listening(server: Server, port: int = PORT) -> Iterator[tuple[str, uvicorn.Server, socket.socket]]:
    """(its address, what runs it, the socket that it is to be run on): connections wait there from now on.

    Args:
        port: on loopback; 0 takes a free one.

    Raises:
        OSError, OverflowError: the port is taken, or no port.
    """
    with socket.create_server((LOOPBACK, port)) as place:
        patience = server.patience
        config = uvicorn.Config(
            server.app,
            log_level="warning",
            http=_protocol(patience),
            ws="none",
            timeout_keep_alive=max(1, round(patience.idle)),
        )
        yield f"http://{LOOPBACK}:{place.getsockname()[1]}", uvicorn.Server(config), place
