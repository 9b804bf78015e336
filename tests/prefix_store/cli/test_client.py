from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import typer

from prefix_store.cli import client as module
from prefix_store.cli.client import Client, Failure
from tests.prefix_store.cli.conftest import Antefix, Running


def client(answer: Callable[[httpx.Request], httpx.Response]) -> Client:
    return Client(httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)))


def answering(reply: httpx.Response) -> Client:
    return client(lambda request: reply)


def test_without_a_server_the_command_says_how_to_start_one(antefix: Antefix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTEFIX_URL", "http://127.0.0.1:9")
    for arguments in (["prefix", "ls"], ["generate", "hi"], ["compare", "hi", "--bare"], ["jobs"]):
        result = antefix(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1
        assert "antefix serve" in result.stderr


def test_the_server_s_message_is_the_command_s(antefix: Antefix) -> None:
    result = antefix("prefix", "show", "nothing")
    assert (result.exit_code, result.stderr) == (1, "antefix: there is no prefix 'nothing'\n")


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (httpx.Response(502, text="<html>"), "http://server answered 502 Bad Gateway"),
        (httpx.Response(404, json={"detail": "x"}), "is ANTEFIX_URL the address of an antefix server?"),
        (httpx.Response(404, json={"error": {"message": "Not Found", "code": "route_not_found"}}), "is ANTEFIX_URL"),
        (httpx.Response(405, json={"error": {"message": "No", "code": "method_not_allowed"}}), "is ANTEFIX_URL"),
        (httpx.Response(307, headers={"location": "https://server"}), "307 Temporary Redirect to https://server"),
        (httpx.Response(400, json={"error": {"message": "because"}}), "because"),
        (httpx.Response(401, json={"error": {"message": "no such key"}}), "it is taken from ANTEFIX_API_KEY"),
        (httpx.Response(200, text="hello"), "does not answer as an antefix server"),
        (httpx.Response(200, json=["hello"]), "does not answer as an antefix server"),
        (httpx.Response(200, json={"hello": 1}), "no 'data' in its reply"),
    ],
)
def test_any_other_answer_says_what_is_wrong(reply: httpx.Response, said: str) -> None:
    with pytest.raises(Failure) as caught:
        list(answering(reply).pages("/v1/prefixes"))
    assert said in str(caught.value)


def test_a_failure_is_one_line_that_moves_no_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANTEFIX_URL", raising=False)
    with pytest.raises(typer.Exit) as caught, module.connect():
        raise Failure("no \x1b[2J such thing")
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == "antefix: no \\x1b[2J such thing\n"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ('data: {"error": {"message": "broke"}}\n\ndata: [DONE]\n\n', "broke"),
        ('data: {"error": "boom"}\n\n', "boom"),
        ('data: {"error": {"message": 5}}\n\n', "the server failed and does not say why"),
        ("", "ended before its end"),
        ("data: [DONE]\n\n", "ended before its end"),
    ],
)
def test_a_stream_that_breaks_is_a_failure(end: str, said: str) -> None:
    text = 'data: {"text": "a", "finish_reason": null}\n\n' + end
    stream = answering(httpx.Response(200, text=text)).stream("/generate", {})
    assert next(stream)["text"] == "a"
    with pytest.raises(Failure) as caught:
        next(stream)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "localhost:8000",
        "ftp://x",
        "http://",
        "http://[::1",
        "http://x:99999",
        "http://x?y",
        "not one",
    ],
)
def test_an_address_that_is_none_is_refused(antefix: Antefix, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("ANTEFIX_URL", url)
    expected = f"antefix: ANTEFIX_URL must be a server's address such as http://127.0.0.1:8000, got {url!r}\n"
    assert antefix("prefix", "ls").stderr == expected


def test_an_address_with_a_path_too_much_is_asked_about(
    antefix: Antefix, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTEFIX_URL", f"{running.url}/v1")
    for arguments in (["prefix", "ls"], ["generate", "hi"], ["compare", "hi", "--bare"]):
        result = antefix(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "/v1 answered 404 Not Found; is ANTEFIX_URL the address" in result.stderr


@pytest.mark.parametrize("key", ["two words", "schlüssel", "two\nlines"])
def test_a_key_that_is_none_is_refused_and_not_shown(
    antefix: Antefix, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("ANTEFIX_API_KEY", key)
    result = antefix("prefix", "ls")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "ANTEFIX_API_KEY must be one key" in result.stderr
    assert key not in result.stderr


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", float("nan"), "temperature must be a finite number, got nan"),
        ("prompt", "\udcff", "prompt is not valid text"),
        ("examples", ["\udcff"], "the request cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_named(field: str, value: object, said: str) -> None:
    with pytest.raises(Failure) as caught:
        list(answering(httpx.Response(200)).stream("/generate", {"seed": 1, field: value}))
    assert said in str(caught.value)


def test_what_is_sent_and_received_is_told_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[int | None]] = {}

    @contextmanager
    def transfer(doing: str, total: int | None) -> Iterator[Callable[[int], None]]:
        told[doing] = [total]
        yield told[doing].append

    monkeypatch.setattr(module, "transfer", transfer)
    sent = b"x" * (module.CHUNK + 1)
    took = client(lambda request: httpx.Response(200, json={"took": len(b"".join(request.stream))}))
    assert took.post("/x", content=sent) == {"took": len(sent)}
    assert told["sending"] == [len(sent), module.CHUNK, 1]
    answering(httpx.Response(200, content=sent)).download("/x")
    assert told["receiving"] == [len(sent), len(sent)]


def test_a_stream_s_lines_end_where_the_server_ends_them() -> None:
    closing = '"finish_reason": "stop", "prefix": null, "usage": {"completion_tokens": 3}'
    text = f'data: {{"text": "a\u2028b\u0085c", {closing}}}\n\ndata: [DONE]\n\n'.encode()
    pieces = [text[start : start + 5] for start in range(0, len(text), 5)]
    stream = answering(httpx.Response(200, content=iter(pieces))).stream("/generate", {})
    assert [event["text"] for event in stream] == ["a\u2028b\u0085c"]


def test_lists_are_read_to_their_end() -> None:
    pages = {None: (["a", "b"], True), "b": (["c"], False)}

    def answer(request: httpx.Request) -> httpx.Response:
        ids, more = pages[request.url.params.get("after")]
        return httpx.Response(200, json={"data": [{"id": name} for name in ids], "has_more": more})

    assert [item["id"] for item in client(answer).pages("/v1/prefixes")] == ["a", "b", "c"]


def test_a_list_s_order_may_go_by_several_fields() -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(dict(request.url.params))
        return httpx.Response(200, json={"data": [{"tenant": "t", "id": "a"}], "has_more": len(asked) < 2})

    assert len(list(client(answer).pages("/v1/prefixes", "tenant", "id", shared=True, method=None))) == 2
    assert asked == [{"shared": "true"}, {"shared": "true", "after": "t/a"}]


def test_the_key_is_sent_from_the_environment_or_a_file(
    antefix: Antefix, running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    presented, _ = running.store.keys.create("acme", ["generate"])
    assert antefix("generate", "hi").exit_code == 1
    monkeypatch.setenv("ANTEFIX_API_KEY", presented)
    assert antefix("generate", "hi").exit_code == 0
    monkeypatch.delenv("ANTEFIX_API_KEY")
    (tmp_path / "key").write_text(f"{presented}\n")
    monkeypatch.setenv("ANTEFIX_API_KEY_FILE", str(tmp_path / "key"))
    assert antefix("generate", "hi").exit_code == 0
