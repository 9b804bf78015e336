"""Requests that are meant to hurt, over real HTTP: each is refused in the shape of every error, or answered right.

No refusal says back what came, and meanwhile, to a client in another process, the server is as healthy as ever.
"""

from __future__ import annotations

import itertools
import json
import random
import string
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.health import watched
from tests.e2e.processes import SERVER, Running
from tests.e2e.wire import JSON, Reply, posting, request, send

pytestmark = pytest.mark.slow
CANARY = "canary" * 50  # of what comes, at most a part this long may come back
ECHOED = 200
DEEP = 100_000
MESSAGES = '[{"role": "user", "content": "x"}]'
# A body's beginning on each route, up to the field that hurts.
BEGINNINGS = {
    "/generate": '{"prompt": "The king", "max_tokens": 2, ',
    "/v1/completions": '{"model": "plays", "prompt": "The king", "max_tokens": 2, ',
    "/v1/chat/completions": f'{{"model": "plays", "messages": {MESSAGES}, "max_tokens": 2, ',
}
NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "min_tokens", "n", "timeout_s", "num_beams", "length_penalty"),
)
NO_NUMBERS = ['"5"', "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "[]", "{}", "true", f'"{CANARY}"']


def nested(opening: str, closing: str, inside: str = "") -> str:
    return opening * DEEP + inside + closing * DEEP


RNG = random.Random(0)
NOISE = "".join(RNG.choice(string.ascii_letters) for _ in range(1_000_000))
FIELDS: dict[str, str] = {
    **{f"{name} {value[:9]}": f'"{name}": {value}' for name in NUMBERS for value in NO_NUMBERS},
    **{f"{name} below": f'"{name}": -3' for name in NUMBERS if name != "seed"},
    "a text for n": '"n": "2"',
    "huge n": '"n": 1000000000',
    "huge seed": f'"seed": {2**64}',
    "a huge logit_bias": f'"logit_bias": {json.dumps(dict.fromkeys(range(100_000), 1))}',
    "a logit_bias without end": '"logit_bias": {"5": Infinity}',
    "a logit_bias of no token": f'"logit_bias": {{"{CANARY}": 1}}',
    "a logit_bias below": '"logit_bias": {"-1": 1}',
    "a logit_bias twice": '"logit_bias": {"1": 1, "1": 2}',
    "a field twice": f'"seed": 1, "seed": 2, "user": "{CANARY}"',
    "17 stops": f'"stop": {json.dumps(["x"] * 17)}',
    "a long stop": f'"stop": "{CANARY}"',
    "an empty stop": '"stop": ""',
    "half a surrogate pair to stop at": f'"stop": "{CANARY}\\ud800"',
    "half a surrogate pair as a name": f'"\\udc00{CANARY}": 1',
    "nested lists": f'"stop": {nested("[", "]")}',
    "nested lists that nobody closes": f'"stop": {"[" * DEEP}',
    "nested objects": '"logit_bias": ' + nested('{"a":', "}", "1"),
    "a bare zero byte": f'"user": "{CANARY}\0"',
    "a million empty objects": f'"stop": [{"{}," * 1_000_000}{{}}]',
    "a million numbers": f'"stop_token_ids": [{"1," * 1_000_000}1]',
}  # fmt: skip
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "a text": f'"{CANARY}"'.encode(),
    "two": b"{}{}",
    "no UTF-8": f'{{"prompt": "{CANARY}'.encode() + b'\xff\xfe"}',
    "UTF-16": '{"prompt": "x", "model": "plays"}'.encode("utf-16"),
    "brackets": b"[" * DEEP,
    "a text prompt's end": b'{"prompt": "x',
    "zeros": bytes(10_000),
}
PROMPTS: dict[str, str] = {
    "a million characters": json.dumps(NOISE),
    "a million of one": json.dumps("a" * 1_000_000),
    "as many characters as are still encoded": json.dumps("a" * 262_000),
    "half a million ids": json.dumps([5] * 500_000),
    "an id below": "[-1]",
    "an id above": "[6144]",
    "an id far above": f"[{10**30}]",
    "half an id": "[1.5]",
    "truths": "[true]",
    "an object": f'{{"text": "{CANARY}"}}',
    "half a surrogate pair": f'"{CANARY}\\ud800"',
    "nested": nested("[", "]", "1"),
}
OTHERS: dict[str, tuple[str, bytes]] = {
    "a million characters as messages": (
        "/v1/chat/completions",
        json.dumps({"model": "plays", "messages": [{"role": "user", "content": NOISE}]}).encode(),
    ),
    "messages of no text": (
        "/v1/chat/completions",
        json.dumps({"model": "plays", "messages": [{"role": "user", "content": [{"type": CANARY}]}]}).encode(),
    ),
    "a model of zeros": ("/v1/completions", f'{{"model": "a\\u0000{CANARY}", "prompt": "x"}}'.encode()),
    "512 long prompts": (
        "/v1/completions",
        json.dumps({"model": "plays", "prompt": [NOISE[:7000]] * 512, "max_tokens": 1}).encode(),
    ),
    "prompts times n": ("/v1/completions", json.dumps({"model": "plays", "prompt": ["x"] * 512, "n": 64}).encode()),
    "a number to tokenize": ("/tokenize", b'{"prompt": 5}'),
    "ids below to detokenize": ("/detokenize", b'{"tokens": [-5]}'),
    "too many examples": (
        "/v1/prefixes/mine/train",
        b'{"examples": [' + b",".join([b'{"prompt":"abcdefgh","completion":"b"}'] * 1_500_000) + b"]}",
    ),
    "numbers for examples": ("/v1/prefixes/mine/train", b'{"examples": [{"prompt": [' + b"1," * 20_000_000 + b"1]}]}"),
    "lists for examples": ("/v1/prefixes/mine/train", b'{"examples": [' + b"[]," * 15_000_000 + b"[]]}"),
    "texts for examples": ("/v1/prefixes/mine/train", b'{"examples": [' + b'"",' * 15_000_000 + b'""]}'),
}  # fmt: skip
HEADS: dict[str, bytes] = {
    "200 kB of headers": request("GET", "/v1/model", {f"X-{number}": "y" * 100 for number in range(2000)}),
    "a header of 200 kB": request("GET", "/v1/model", {"X-A": "y" * 200_000}),
    "an address of 200 kB": request("GET", "/" + "y" * 200_000),
    "an address of 50 kB": request("GET", "/v1/prefixes/" + "y" * 50_000),
    "a zero in a header": request("GET", "/v1/model", {"X-A": "a\0b"}),
    "no HTTP at all": b"\x16\x03\x01\x02\0\x01\0" + CANARY.encode() + b"\r\n\r\n",
    "a method of zeros": b"\0\x01\x02 / HTTP/1.1\r\n\r\n",
    "a method that is none": request("BREW", "/generate"),
    "two hosts": request("GET", "/v1/model", {"host": "localhost"}),
    "no host": b"GET /v1/model HTTP/1.1\r\n\r\n",
    **{
        f"host {host}": f"GET /v1/model HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        for host in ("evil.example", "[::1", "evil.example:x", "localhost@evil.example", "localhost.evil.example")
    },
    "an origin that is none": request("GET", "/v1/model", {"Origin": "http://[::1"}),
    "a length below": request("POST", "/generate", {"Content-Length": "-5"}),
    "a length of ages": request("POST", "/generate", {"Content-Length": "9" * 20}),
    "two lengths": request("POST", "/generate", {"Content-Length": "5", "content-length": "6"}),
    "a chunk of no size": request("POST", "/generate", {"Transfer-Encoding": "chunked", "Content-Type": JSON})
    + b"zz\r\n",
    "an address that is no UTF-8": request("GET", "/v1/prefixes/%ff%fe"),
    "a zero in an address": request("GET", "/v1/prefixes/a%00b"),
    "a limit of ages": request("GET", f"/v1/prefixes?limit={'9' * 400}"),
    "a limit of NaN": request("GET", "/v1/prefixes?limit=NaN"),
    "an unknown parameter": request("GET", f"/v1/model/?{CANARY}=1"),
    "a zipped body": posting("/generate", b"\x1f\x8b\x08").replace(
        b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n", 1
    ),
}
TYPES = ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", "é", "*/*"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running.start(tmp_path_factory.mktemp("hostile"), *SERVER)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module", autouse=True)
def healthy(server: Running) -> Iterator[None]:
    """All the while."""
    with watched(server):
        yield
    assert '"unhandled"' not in server.log.read_text()


def refused(reply: Reply, name: str, sent: bytes = b"") -> str:
    """The code."""
    assert 400 <= reply.status < 500, (name, reply.head[:100], reply.body[:200])
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, name
    assert error["message"], name
    assert b"x-request-id" in reply.head, name
    assert len(reply.body) < 1200, name
    assert CANARY[:ECHOED].encode() not in reply.body, f"{name}: it says back what came"
    return str(error["code"])


def answered(server: Running, path: str, **body: Any) -> dict[str, Any]:
    reply = send(server, posting(path, json.dumps(body).encode()))
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.json()
    return found


@pytest.mark.parametrize("path", BEGINNINGS)
def test_fields_that_are_wrong(server: Running, path: str) -> None:
    for name, field in FIELDS.items():
        refused(send(server, posting(path, (BEGINNINGS[path] + field + "}").encode())), name)


@pytest.mark.parametrize("path", [*BEGINNINGS, "/tokenize", "/detokenize", "/v1/prefixes/mine/train"])
def test_bodies_that_are_none(server: Running, path: str) -> None:
    for name, body in BODIES.items():
        refused(send(server, posting(path, body)), name)
    for content_type in TYPES:
        refused(send(server, posting(path, b"{}", content_type)), content_type)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_prompts_that_are_wrong(server: Running, path: str) -> None:
    named = "" if path == "/generate" else '"model": "plays", '
    for name, prompt in PROMPTS.items():
        code = refused(send(server, posting(path, f'{{{named}"prompt": {prompt}}}'.encode())), name)
        assert code in ("invalid_request", "context_length_exceeded"), name


@pytest.mark.parametrize("name", OTHERS)
def test_bodies_that_are_too_much(server: Running, name: str) -> None:
    refused(send(server, posting(*OTHERS[name])), name)


def test_heads_that_are_wrong(server: Running) -> None:
    for name, head in HEADS.items():
        refused(send(server, head), name)


def test_bodies_that_never_end(server: Running) -> None:
    chunked = {"Transfer-Encoding": "chunked", "Content-Type": JSON}
    for path in (*BEGINNINGS, "/tokenize", "/v1/prefixes/mine/aliases/x"):
        method = "PUT" if "alias" in path else "POST"
        endless = itertools.chain(
            [request(method, path, chunked)], itertools.repeat(b"ffff\r\n" + b" " * 0xFFFF + b"\r\n", 2000)
        )
        assert refused(send(server, endless), path) == "payload_too_large"


def test_what_is_odd_and_right_is_answered(server: Running) -> None:
    body = {"prompt": "The king", "max_tokens": 8}
    greedy = answered(server, "/generate", **body, temperature=0)["text"]
    for odd in ({"temperature": 1e-300}, {"temperature": 5e-324}, {"top_p": 1e-300}, {"top_k": 1}, {"min_p": 1.0}):
        assert answered(server, "/generate", **body, **odd)["text"] == greedy, odd
    begin = answered(server, "/tokenize", prompt="")["tokens"] or [0]
    empty = answered(server, "/generate", prompt="", prefix_id="plays", max_tokens=8, temperature=0)
    named = answered(server, "/generate", prompt=begin, prefix_id="plays", max_tokens=8, temperature=0)
    assert (empty["text"], empty["usage"]) == (named["text"], named["usage"])
    assert empty["text"] != answered(server, "/generate", prompt="", max_tokens=8, temperature=0)["text"]
    zero = answered(server, "/generate", prompt="a\0b", echo=True, max_tokens=1)
    assert zero["text"].startswith("a\0b")
    flood = send(server, request("GET", "/v1/model", {f"X-{number}": "y" for number in range(4000)}))
    assert (flood.status, flood.json()["id"]) == (200, "antefix-demo")


def test_long_texts_are_tokenized_beside_everything_else(server: Running) -> None:
    for text in (NOISE, "a" * 1_000_000, " " * 1_000_000, "hello world " * 83_000, "é" * 500_000):
        assert answered(server, "/tokenize", prompt=text)["count"] > 1000


def test_as_many_log_probabilities_as_there_can_be(server: Running) -> None:
    body = {"prompt": "x " * 30, "max_tokens": 20, "n": 64, "logprobs": 20, "echo": True, "ignore_eos": True}
    assert len(answered(server, "/generate", **body)["choices"]) == 64
    stream = send(server, posting("/v1/completions", json.dumps({**body, "model": "plays", "stream": True}).encode()))
    assert b"data: [DONE]" in stream.body[-100:]
