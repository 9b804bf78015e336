from collections.abc import Callable

import httpx
import pytest
import typer

from prefix_store.cli.client import Client
from tests.prefix_store.cli.conftest import Antefix, Running


def client(answer: Callable[[httpx.Request], httpx.Response]) -> Client:
    return Client(httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)))


def answering(reply: httpx.Response) -> Client:
    return client(lambda request: reply)


def test_without_a_server_the_command_says_how_to_start_one(antefix: Antefix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTEFIX_URL", "http://127.0.0.1:9")
    for arguments in (["prefix", "ls"], ["generate", "hi"], ["jobs"]):
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
        (httpx.Response(502, text="<html>"), "the server answered 502"),
        (httpx.Response(404, json={"detail": "x"}), "the server answered 404"),
        (httpx.Response(400, json={"error": {"message": "because"}}), "because"),
        (httpx.Response(200, text="hello"), "does not answer as an antefix server"),
    ],
)
def test_any_other_answer_is_one_line(reply: httpx.Response, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        answering(reply).get("/v1/prefixes")
    assert caught.value.exit_code == 1
    written = capsys.readouterr().err
    assert said in written
    assert written.count("\n") == 1


def test_an_error_within_a_stream_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = 'data: {"text": "a"}\n\ndata: {"error": {"message": "broke"}}\n\ndata: [DONE]\n\n'
    stream = answering(httpx.Response(200, text=text)).stream("/generate", {})
    assert next(stream) == {"text": "a"}
    with pytest.raises(typer.Exit):
        next(stream)
    assert "broke" in capsys.readouterr().err


def test_lists_are_read_to_their_end() -> None:
    pages = {None: (["a", "b"], True), "b": (["c"], False)}

    def answer(request: httpx.Request) -> httpx.Response:
        ids, more = pages[request.url.params.get("after")]
        return httpx.Response(200, json={"data": [{"id": name} for name in ids], "has_more": more})

    assert [item["id"] for item in client(answer).pages("/v1/prefixes")] == ["a", "b", "c"]


def test_the_key_is_sent(antefix: Antefix, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    presented, _ = running.store.keys.create("acme", ["generate"])
    assert antefix("generate", "hi").exit_code == 1
    monkeypatch.setenv("ANTEFIX_API_KEY", presented)
    assert antefix("generate", "hi").exit_code == 0
