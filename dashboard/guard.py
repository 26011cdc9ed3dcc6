"""Who the dashboard answers, and what its pages may reach: this machine, and nothing else.

A store can hold text of strangers: a page that showed it as markup could otherwise fetch an image, and say by its
address what it saw. And a page of the web whose name points to 127.0.0.1 could otherwise read the store.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' blob:",  # Streamlit's page has inline scripts; its components are blobs
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "media-src 'self' data: blob:",
        "connect-src 'self' ws://127.0.0.1:* ws://localhost:* data: blob:",  # not every browser's 'self' covers ws
        "worker-src 'self' blob:",
        "frame-src 'self' blob: data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)
"""Nothing is fetched from, sent to or framed by another host."""


def named(host: str) -> bool:
    """Whether a Host (or what stands in an Origin) is a name of this machine."""
    try:
        return urlsplit(f"//{host}").hostname in HOSTS and urlsplit(f"//{host}").username is None
    except ValueError:
        return False


class Guard:
    """Around the application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not named(host) or (origin and not named(origin.partition("://")[2])):
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})
            else:
                told = f"the dashboard answers {' and '.join(HOSTS)} only\n"
                await PlainTextResponse(told, status_code=403)(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self._app(scope, receive, guarded)
