"""The completion server over HTTP, against what the model writes."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from haltscale.model.generation import Sampling
from haltscale.platform.inference import serving
from haltscale.platform.inference.models import load_model
from haltscale.platform.inference.serving import Completion, Patience, Server, listening, pieces
from haltscale.platform.inference.text_generation import WrittenToken, write


@pytest.fixture
def loaded(finished):
    return load_model(finished())


@pytest.fixture
def address(loaded) -> Iterator[str]:
    """A running server; a connection that comes before it is ready waits on its socket."""
    with listening(Server(loaded, "quick/run"), port=0) as (address, runner, place):
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [place]})
        thread.start()
        yield address
        runner.should_exit = True
        thread.join()


def ask(
    address: str, path: str, body: object = None, *, host: str | None = None, kind: str = "application/json"
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    headers = ({"Host": host} if host else {}) | ({} if body is None else {"Content-Type": kind})
    text = body if isinstance(body, str) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, None if body is None else text, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def complete(address: str, **body) -> dict:
    status, text = ask(address, "/v1/completions", body)
    assert status == 200, text
    return json.loads(text)


def own(loaded, prompt: str, tokens: int, sampling: Sampling | None = None) -> list[WrittenToken]:
    return list(write(loaded, [prompt], new_tokens=tokens, sampling=sampling or Sampling()))


def test_completions_are_what_the_model_writes(address, loaded):
    prompts = ["Once upon", "A longer text"]
    found = complete(address, model="quick/run", prompt=prompts, max_tokens=12, temperature=0)
    assert found["object"] == "text_completion"
    expected = [own(loaded, prompt, 12) for prompt in prompts]
    for choice, tokens in zip(found["choices"], expected, strict=True):
        assert choice["text"] == "".join(token.text for token in tokens)
        assert choice["latent_steps"] == [token.steps for token in tokens]
        ended = tokens[-1].token_id == loaded.end_of_text
        assert choice["finish_reason"] == ("stop" if ended else "length")
    count = sum(map(len, expected))
    read = 2 + sum(len(prompt) for prompt in prompts)  # of bytes, and end-of-text before each
    assert found["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": count,
        "total_tokens": read + count,
        "latent_steps": sum(token.steps for tokens in expected for token in tokens),
    }
    assert found["usage"]["latent_steps"] > 0


def test_drawing_is_seeded(address, loaded):
    settings = {"prompt": "Once", "max_tokens": 10, "temperature": 2.0, "top_p": 0.9}
    one, again, other = (complete(address, **settings, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2))
    assert one == again != other
    sampling = Sampling(temperature=2.0, top_p=0.9, seed=1)
    assert one == "".join(token.text for token in own(loaded, "Once", 10, sampling))
    assert len({complete(address, **settings)["choices"][0]["text"] for _ in range(4)}) > 1, "without a seed, any"


def test_a_stream_adds_up_to_the_whole(address):
    settings = {"prompt": ["Once upon", "It was"], "max_tokens": 9, "temperature": 0}
    whole = complete(address, **settings)
    status, text = ask(
        address, "/v1/completions", {**settings, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert status == 200
    events = re.findall(r"data: (.*)\n\n", text)
    assert events.pop() == "[DONE]"
    *chunks, last = map(json.loads, events)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len(chunks) == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [step for one in mine for step in one["latent_steps"]] == choice["latent_steps"]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
    assert ask(address, "/v1/completions", {**settings, "stream": True})[1].count("usage") == 0


def test_a_stop_is_left_out(address):
    settings = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0}
    text = complete(address, **settings)["choices"][0]["text"]
    stop = text[5:7]
    [choice] = complete(address, **settings, stop=["never", stop])["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert len(choice["latent_steps"]) < 12


def written(*texts: tuple[int, str]) -> Iterator[WrittenToken]:
    for prompt, text in texts:
        yield WrittenToken(prompt=prompt, token_id=1, text=text, steps=1, nll=0.0)


def test_what_may_be_the_beginning_of_a_stop_is_held_back():
    request = SimpleNamespace(prompts=["", ""], stop=["abc"], new_tokens=5)
    tokens = written((0, "x"), (1, "a"), (0, "a"), (1, "b"), (0, "b"), (1, "d"), (0, "cz"), (1, "ab"), (1, ""))
    found = [(one.choice, one.text, one.finish) for one in pieces(tokens, request, end_of_text=0)]
    assert found == [
        (0, "x", None), (1, "", None), (0, "", None), (1, "", None), (0, "", None), (1, "abd", None),
        (0, "", "stop"), (1, "", None), (1, "ab", "length"),
    ]  # fmt: skip


def test_no_more_is_written_than_is_asked_for():
    """When all have met their stops, the model is not asked for another token."""

    def tokens() -> Iterator[WrittenToken]:
        yield from written((0, "end"))
        pytest.fail("another token was written")

    request = SimpleNamespace(prompts=[""], stop=["end"], new_tokens=5)
    assert [one.finish for one in pieces(tokens(), request, end_of_text=0)] == ["stop"]


def test_the_model_that_is_there(address):
    status, text = ask(address, "/v1/models")
    assert status == 200
    assert [one["id"] for one in json.loads(text)["data"]] == ["quick/run"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": ""}, 400, "prompt 0 is empty"),
        ({"prompt": "x" * 64}, 400, "more than the model's context of 64"),
        ({"prompt": "x", "max_tokens": 64}, 400, "room for"),
        ({"prompt": "x", "max_tokens": 0}, 400, "new_tokens"),
        ({"prompt": "x", "max_tokens": "many"}, 400, "new_tokens"),
        ({"max_tokens": 3}, 400, "prompt must be"),
        ({"prompt": [[1, 2]]}, 400, "prompt must be"),
        ({"prompt": "x", "temperature": -1, "top_p": 2}, 400, "top_p"),
        ({"prompt": "x", "stop": 3}, 400, "stop must be"),
        ({"prompt": "x", "n": 2, "echo": True}, 400, "echo = True is not supported"),
        ({"prompt": "x", "temprature": 0}, 400, "temprature is not known"),
        ({"prompt": "x", "model": "gpt-4"}, 404, "available: quick/run"),
        ([], 400, "must be a JSON object"),
        ("{", 400, "Expecting property name"),
        ("[" * 100_000, 400, "recursion"),
        ({"prompt": "x", "temperature": 1e-320}, 400, "temperature"),
        ({"prompt": "half \ud83d"}, 400, "U+D83D, half a surrogate pair"),
        ({"prompt": "x", "stop": "\ud83d", "model": "\ud83d"}, 404, "no model"),
        ({"prompt": "x", "\ud83d": 1}, 400, "is not known"),
        ({"prompt": "x", "seed": 10**400}, 400, "seed"),
        ({"prompt": "x", "top_k": 10**400, "max_tokens": 10**400}, 400, "new_tokens"),
        ('{"prompt": "x", "temperature": NaN}', 400, "temperature"),
        ('{"prompt": "x", "temperature": 1e999}', 400, "temperature"),
        ({"prompt": "word " * 200_000}, 400, "more than any text of the model's context"),
        ({"prompt": ["x"] * 1000}, 400, "at most 128"),
        ({"prompt": "x" * (5 << 20)}, 413, "longer than"),
    ],
)
def test_what_is_refused(address, body, status, said):
    found, text = ask(address, "/v1/completions", body)
    assert found == status, text
    error = json.loads(text)["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def refused(answer: tuple[int, str], status: int, said: str) -> None:
    """An error, in the API's shape."""
    assert answer[0] == status, answer
    error = json.loads(answer[1])["error"]
    assert said in error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")


def test_every_error_has_the_shape_of_the_api(address, loaded, monkeypatch):
    refused(ask(address, "/v1/chat"), 404, "POST /v1/completions")
    refused(ask(address, "/v1/completions"), 405, "POST /v1/completions")
    refused(ask(address, "/v1/models", host="evil.example"), 400, "not this machine")
    refused(ask(address, "/v1/completions", {"prompt": "x"}, kind="text/plain"), 415, "application/json")
    with socket.create_connection(_place(address)) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        answer = raw.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    monkeypatch.setattr(serving, "AT_ONCE", 0)
    refused(ask(address, "/v1/completions", {"prompt": "x"}), 503, "ask again")
    monkeypatch.setattr(serving, "AT_ONCE", 1)
    monkeypatch.setattr(Completion, "parse", lambda body: 1 / 0)  # a fault of ours
    refused(ask(address, "/v1/completions", {"prompt": "x"}), 500, "ZeroDivisionError")
    monkeypatch.undo()
    monkeypatch.setattr(serving, "AT_ONCE", 1)
    for _ in range(3):  # a place is given back, however a request ended
        assert ask(address, "/v1/completions", {"prompt": "x", "max_tokens": 1, "stream": True})[0] == 200
        refused(ask(address, "/v1/completions", {"prompt": ""}), 400, "empty")
    complete(address, prompt="x", max_tokens=1)


def _place(address: str) -> tuple[str, int]:
    host, port = urlsplit(address).netloc.split(":")
    return host, int(port)


@pytest.fixture
def impatient(loaded) -> Iterator[str]:
    """A server that waits for a fifth of a second."""
    server = Server(loaded, "quick/run", patience=Patience(headers=0.2, body=0.2, idle=1, taking=5))
    with listening(server, port=0) as (address, runner, place):
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [place]})
        thread.start()
        yield address
        runner.should_exit = True
        thread.join()


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n"


@pytest.mark.parametrize("said", [b"", b"GET /v1/mod", HEAD], ids=["nothing", "half a line", "half the headers"])
def test_whoever_says_nothing_is_hung_up_on_and_shuts_nobody_out(impatient, said):
    with contextlib.ExitStack() as held:
        idle = [held.enter_context(socket.create_connection(_place(impatient), timeout=30)) for _ in range(40)]
        for one in idle:
            one.sendall(said)
        assert ask(impatient, "/v1/models")[0] == 200
        assert complete(impatient, prompt="x", max_tokens=1)["usage"]["completion_tokens"] == 1
        assert [one.recv(1) for one in idle] == [b""] * 40  # the server has closed them


def test_a_body_that_does_not_come_is_told(impatient):
    with socket.create_connection(_place(impatient), timeout=30) as half:
        half.sendall(HEAD + b"\r\n{")
        assert ask(impatient, "/v1/models")[0] == 200
        answer = half.makefile("rb").read()
    refused((int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2].decode()), 408, "did not arrive")


def test_a_long_prompt_keeps_nobody_waiting(address, loaded, monkeypatch):
    """While one request is tokenised, others are answered."""
    begun, go_on = threading.Event(), threading.Event()
    real = Completion.parse

    def slow(body):
        begun.set()
        assert go_on.wait(60)
        return real(body)

    monkeypatch.setattr(Completion, "parse", slow)
    asking = threading.Thread(target=complete, args=(address,), kwargs={"prompt": "x", "max_tokens": 1})
    asking.start()
    assert begun.wait(60)
    assert ask(address, "/v1/models")[0] == 200
    go_on.set()
    asking.join()


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError, match=r"best_of.*\n.*prompt must(.|\n)*temperature"):
        Completion.parse({"best_of": 2, "temperature": 1000})


def test_other_names_of_this_machine_are_not_answered(address):
    assert ask(address, "/v1/models", host="evil.example")[0] == 400
    assert ask(address, "/v1/models", host="localhost")[0] == 200


def test_the_verb(finished, tmp_path):
    """A process of its own: says where it is, answers there, on loopback alone, and ends by Ctrl-C."""
    arguments = ["-m", "haltscale.platform.cli", "serve", str(finished()), "--port", "0", "--store", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        line = run.stdout.readline()
        [address] = re.findall(r"http://127\.0\.0\.1:\d+", line)
        assert complete(address, prompt="Once", max_tokens=2)["usage"]["completion_tokens"] > 0
        port = urlsplit(address).port
        assert port
        with pytest.raises(OSError), socket.create_connection((_outer_address(), port), timeout=5):  # noqa: PT011
            pass
        taken = subprocess.run(
            [sys.executable, *arguments[:-4], "--port", str(port)], capture_output=True, text=True, check=False
        )
        assert "choose another one with --port" in taken.stderr
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=30)


def _outer_address() -> str:
    """Another address of this machine; on Linux all of 127/8 is one, and no server on 127.0.0.1 answers there."""
    return "127.0.0.2"


def test_the_name_of_end_of_text_in_a_prompt_is_text(address, loaded):
    """As in training: a prompt cannot begin another document."""
    name = loaded.tokenizer.id_to_token(loaded.end_of_text)
    found = complete(address, prompt=f"a{name}b", max_tokens=1, temperature=0)
    assert found["usage"]["prompt_tokens"] == 1 + len(loaded.encode([f"a{name}b"])[0]) > 4
