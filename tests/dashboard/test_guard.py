"""Whom a real dashboard answers, and what it lets its pages reach."""

import http.client

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from haltscale.dashboard import layout
from haltscale.dashboard.guard import POLICY, Guard, named

UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
FOREIGN = (
    "evil.example:80",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "user@127.0.0.1",
    "",
    "[::1",
    "10.0.0.1",
)


def test_a_real_server_answers_no_foreign_name(author, tools):
    author.plan([])
    with tools.server(author.store.root) as address:
        place = address.removeprefix("http://")

        def asked(path: str, headers: dict[str, str]) -> tuple[int, str | None]:
            connection = http.client.HTTPConnection(place, timeout=30)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            found = answer.status, answer.getheader("content-security-policy")
            connection.close()
            return found

        assert asked("/", {}) == (200, POLICY)
        assert asked("/", {"Host": "evil.example"})[0] == 403
        own, foreign = (
            UPGRADE | {"Origin": f"http://{place}"},
            {"Host": "evil.example", "Origin": "http://evil.example"},
        )
        assert asked("/_stcore/stream", own)[0] == 101
        assert asked("/_stcore/stream", UPGRADE | foreign)[0] == 403  # DNS rebinding: both are the stranger's
        assert asked("/_stcore/stream", UPGRADE | {"Origin": "http://evil.example"})[0] == 403


def app() -> TestClient:
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("in")

    routes = [Route("/", lambda _: PlainTextResponse("in")), WebSocketRoute("/socket", socket)]
    return TestClient(Guard(Starlette(routes=routes)), base_url="http://127.0.0.1")


@pytest.mark.parametrize("host", FOREIGN)
def test_only_names_of_this_machine_are_answered(host):
    assert app().get("/", headers={"Host": host}).status_code == 403
    assert app().get("/", headers={"Origin": f"http://{host}" if host else "null"}).status_code == 403
    with (
        pytest.raises(WebSocketDisconnect),
        app().websocket_connect("/socket", headers={"Host": host, "Origin": f"http://{host}"}),
    ):
        pass
    assert not named(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8501", "LOCALHOST"])
def test_this_machine_is_answered(host):
    answer = app().get("/", headers={"Host": host})
    assert (answer.text, answer.headers["content-security-policy"]) == ("in", POLICY)
    with app().websocket_connect("/socket", headers={"Host": host, "Origin": f"http://{host}"}) as socket:
        assert socket.receive_text() == "in"


@pytest.mark.parametrize(
    "text", ["![x](http://evil.example/x.png)", "[a](b)", "<img src=x>", "www.evil.example", ":red[x]"]
)
def test_labels_of_the_store_are_no_markup(text):
    assert layout.label(text) == layout.plain(text) != text


@pytest.mark.parametrize("text", ["adaptive", "0.6m", "1", "0.3", "mor", "some name"])
def test_plain_labels_stay_as_they_are(text):
    assert layout.label(text) == text
