import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from prefix_store.cli import columns, compare
from prefix_store.errors import GenerationFailed
from prefix_store.model.prompt import encode
from tests.models import random_kv
from tests.prefix_store.cli.conftest import ANSWER, HOSTILE, SPELT, Antefix, Instead, Running
from tests.server import artefacts

COMMAND = (sys.executable, "-c", "from prefix_store.cli import main; main()", "compare")


@pytest.fixture(scope="module", autouse=True)
def _prefixes(running: Running) -> None:
    for seed, name in enumerate(("one", "two")):
        tensors = {"self.kv": random_kv(running.frozen, 4, seed)}
        running.store.prefixes.save("default", name, artefacts.manifest(running.frozen), tensors)


@pytest.fixture
def held(running: Running) -> Iterator[None]:
    """Every answer stops behind its first token until the test sets `hold`."""
    running.loop.requests.clear()
    running.loop.hold.clear()
    yield
    running.loop.hold.set()


def test_every_column_is_a_block_in_order_with_its_version_and_figures(antefix: Antefix) -> None:
    result = antefix("compare", "hi", "--prefix", "two@1,one", "--prefix", "two", "--bare")
    assert (result.exit_code, result.stderr) == (0, "")
    *blocks, total = result.stdout.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["== (no prefix)", "== two@1", "== one@1", "== two@1"]
    for block in blocks:
        _, text, figures = block.splitlines()
        assert text == ANSWER
        assert figures.endswith("tokens/s  stop")
    assert total.startswith("all together: 52 tokens  ")


@pytest.mark.usefixtures("held")
def test_all_columns_run_at_the_same_time(antefix: Antefix, running: Running) -> None:
    arrived = []

    def release() -> None:
        deadline = time.monotonic() + 5
        while len(running.loop.requests) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        arrived.extend(running.loop.requests)
        running.loop.hold.set()

    releasing = threading.Thread(target=release)
    releasing.start()
    assert antefix("compare", "hi", "--prefix", "one,two", "--bare").exit_code == 0
    releasing.join()
    assert len({request.prefix.digest if request.prefix else None for request in arrived}) == 3


def test_options_reach_the_server(antefix: Antefix, running: Running) -> None:
    antefix("compare", "hi", "--prefix", "one")
    params = running.loop.requests[-1].params
    assert (params.max_tokens, params.is_greedy) == (64, True)
    antefix("compare", "hi", "--prefix", "one", "--max-tokens", "3", "--temperature", "0.5", "--seed", "7")
    params = running.loop.requests[-1].params
    assert (params.max_tokens, params.temperature, params.seed) == (3, 0.5, 7)


def test_one_bad_prefix_is_an_error_and_the_others_go_on(antefix: Antefix) -> None:
    result = antefix("compare", "hi", "--prefix", "nothing,one")
    assert result.exit_code == 1
    assert "== nothing\nerror: there is no prefix 'nothing'\n-- error\n" in result.stdout
    assert f"== one@1\n{ANSWER}\n" in result.stdout
    assert result.stderr == "antefix: nothing: there is no prefix 'nothing'\n"


def test_what_came_before_an_error_is_shown_and_an_error_of_all_is_said_once(
    antefix: Antefix, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.loop, "failure", GenerationFailed("the device is gone"))
    result = antefix("compare", "hi", "--bare", "--prefix", "one")
    assert f"{ANSWER}\nerror: the device is gone\n" in result.stdout
    assert (result.exit_code, result.stderr) == (1, "antefix: the device is gone\n")


def test_control_characters_are_spelt_out(antefix: Antefix, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = encode(running.frozen.tokenizer, "\x1b[2J[red]")[1:]
    monkeypatch.setattr(running.loop, "answer", lambda request: ids)
    assert "\n\\x1b[2J[red]\n" in antefix("compare", "hi", "--bare").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is nothing to compare: name prefixes with --prefix a,b or add --bare"),
        (["--prefix", "a,,b"], "--prefix takes names with commas between, got 'a,,b'"),
        (["--prefix", ""], "--prefix takes names with commas between, got ''"),
        (["--bare", "--temperature", "nan"], "temperature must be a finite number, got nan"),
    ],
)
def test_wrong_options_are_one_line(antefix: Antefix, arguments: list[str], said: str) -> None:
    result = antefix("compare", "hi", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert said in result.stderr


CLOSING: dict[str, Any] = {
    "id": "gen-x",
    "index": 0,
    "text": "a",
    "finish_reason": "stop",
    "prefix": {"id": "one", "version": 1, "digest": "d"},
    "usage": {"completion_tokens": 1},
}


def streamed(*events: object) -> httpx.Response:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in (*events, "[DONE]")]
    return httpx.Response(200, text="".join(f"data: {line}\n\n" for line in lines))


def answering(*events: object, broken: str | None = None) -> Any:
    """A server that streams the events; with `broken`, to this prefix alone, and to the others a sound answer."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/healthz":
            return httpx.Response(200, json={})
        asked = json.loads(request.content)["prefix_id"]
        return streamed(*events) if broken in (None, asked) else streamed(CLOSING)

    return answer


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"text": HOSTILE}, SPELT),
        ({"finish_reason": HOSTILE}, SPELT),
        ({"error": {"message": HOSTILE}}, SPELT),
        ({"error": HOSTILE}, SPELT),
        ({"id": HOSTILE}, ""),
        ({"prefix": {"id": HOSTILE, "version": 1, "digest": HOSTILE}}, ""),
    ],
)
def test_no_field_of_an_event_moves_the_cursor(
    antefix: Antefix, instead: Instead, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], shown: str, live: bool
) -> None:
    instead(answering(CLOSING | change))
    monkeypatch.setattr(compare, "is_live", lambda stream: live)
    result = antefix("compare", "hi", "--prefix", "one")
    assert shown in result.stdout
    assert not set("\x1b\u200f") & set(result.output)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"text": 5, "finish_reason": None}, "'text' is no string"),
        ({"text": None, "finish_reason": None}, "'text' is no string"),
        ({"text": "a"}, "no 'finish_reason' in its reply"),
        ({"text": "a", "finish_reason": None}, "the answer ended before its end"),
        ({"error": "boom"}, "boom"),
        ({"error": None}, "the server failed and does not say why"),
        (CLOSING | {"finish_reason": 5}, "'finish_reason' is no string"),
        (CLOSING | {"usage": []}, "'completion_tokens' is no count"),
        (CLOSING | {"usage": {}}, "no 'completion_tokens' in its reply"),
        *((CLOSING | {"usage": {"completion_tokens": bad}}, "is no count") for bad in ("x", 10**400, -1, True, None)),
        *((CLOSING | {"prefix": bad}, "'prefix' has no version") for bad in ("x", {"version": "1"}, {"version": 1.5})),
        (["a"], "what came is no JSON object"),
        ("[" * 100_000, "what came is no JSON object"),
        ("[DONE]", "the answer ended before its end"),
    ],
)
def test_a_broken_answer_is_its_column_s_error(antefix: Antefix, instead: Instead, event: object, said: str) -> None:
    instead(answering(event, broken="two"))
    result = antefix("compare", "hi", "--prefix", "one,two")
    assert result.stdout.startswith("== one@1\na\n-- stop\n\n== two\n")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("antefix: two: ")
    assert said in result.stderr
    assert said in result.stdout


def test_what_nobody_foresaw_is_a_column_s_error_too(
    antefix: Antefix, instead: Instead, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(column: columns.Column, event: dict[str, Any], now: float) -> None:
        raise LookupError("lost")

    instead(answering(CLOSING))
    monkeypatch.setattr(columns.Column, "take", take)
    result = antefix("compare", "hi", "--bare")
    assert (result.exit_code, result.stderr) == (1, "antefix: the answer cannot be shown: LookupError: lost\n")


def on_a_terminal(running: Running, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """The command with a terminal as its stdout, and that terminal's other end."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "ANTEFIX_URL": running.url, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen([*COMMAND, *arguments], env=environment, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    return process, ours


def read(terminal: int, *, until: bytes | None = None) -> bytes:
    """What the terminal gets, until something is in it or the command has ended."""
    seen = b""
    while until is None or until not in seen:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # how Linux tells that nobody writes any more
            return seen
        if not piece:
            return seen
        seen += piece
    return seen


@pytest.mark.usefixtures("held")
def test_on_a_terminal_columns_fill_and_ctrl_c_ends_it_cleanly(running: Running) -> None:
    process, terminal = on_a_terminal(running, "hi", "--prefix", "one", "--bare")
    filling = read(terminal, until=b"all together: 2 tokens")
    assert b"\x1b[?25l" in filling  # no cursor while it draws
    process.send_signal(signal.SIGINT)
    left = read(terminal)
    assert process.communicate(timeout=10)[1] == b""
    os.close(terminal)
    assert process.returncode == 130
    assert b"\x1b[?25h" in left
    assert b"(no prefix)" in left
