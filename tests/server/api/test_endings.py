"""Answers that end before they begin: a prompt that is only scored, a time that runs out. On a real engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.store import Store
from tests.models import tiny_frozen
from tests.server import artefacts
from tests.server.live import LIMITS, Live, serving

FROZEN = tiny_frozen("llama")
SCORED = {"model": "a", "prompt": "The old man", "echo": True, "logprobs": 2, "temperature": 0}
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("endings")
    store = Store.open(f"sqlite:///{folder}/store.db")
    with serving(store, chat_template="{{ messages[0].content }}") as running:
        running.publish("a", artefacts.native(FROZEN, 6, seed=1))
        yield running
    store.close()


@pytest.fixture
def client(live: Live) -> TestClient:
    return live.client


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def streamed(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    text = client.post(path, json={**body, "stream": True}).text
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]


def test_a_prompt_is_scored_and_nothing_said(live: Live, client: TestClient) -> None:
    before = live.client.app.state.services.loop.stats().generated_tokens
    scored = post(client, "/v1/completions", **SCORED, max_tokens=0)
    [choice] = scored["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The old man", "length")
    prompt = len("The old man") + 1
    used = {"prompt_tokens": prompt, "completion_tokens": 0, "total_tokens": prompt, "virtual_tokens": 6}
    assert scored["usage"] == used
    assert live.client.app.state.services.loop.stats().generated_tokens == before
    [longer] = post(client, "/v1/completions", **SCORED, max_tokens=1, ignore_eos=True)["choices"]
    for name, values in longer["logprobs"].items():
        assert choice["logprobs"][name] == values[:-1]
    assert len(choice["logprobs"]["tokens"]) == prompt


def test_scores_are_the_same_from_every_route_streamed_and_of_several(client: TestClient) -> None:
    [choice] = post(client, "/v1/completions", **SCORED, max_tokens=0)["choices"]
    pieces = [chunk["choices"][0] for chunk in streamed(client, "/v1/completions", **SCORED, max_tokens=0)]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert [piece["logprobs"] for piece in pieces if piece["logprobs"]] == [choice["logprobs"]]
    assert pieces[-1]["finish_reason"] == "length"
    both = post(client, "/v1/completions", **{**SCORED, "prompt": ["The old man", "x"]}, max_tokens=0, n=2)["choices"]
    assert [found["logprobs"] for found in both[:2]] == [choice["logprobs"]] * 2
    body = {name: value for name, value in SCORED.items() if name != "model"}
    plain = post(client, "/generate", **body, prefix_id="a", max_tokens=0)
    assert plain["logprobs"]["token_logprobs"] == choice["logprobs"]["token_logprobs"]
    assert (plain["text"], plain["finish_reason"], plain["usage"]["completion_tokens"]) == (choice["text"], "length", 0)


def test_a_prompt_that_fills_the_context_can_be_scored(client: TestClient) -> None:
    room = LIMITS.context_length - 6
    body = {**SCORED, "prompt": [70] * room}
    assert len(post(client, "/v1/completions", **body, max_tokens=0)["choices"][0]["logprobs"]["tokens"]) == room
    assert client.post("/v1/completions", json={**body, "max_tokens": 1}).status_code == 400


def test_an_end_token_after_the_prompt_does_not_stop_what_says_nothing(client: TestClient) -> None:
    everything = list(range(FROZEN.vocabulary_size - 2))
    body = {**SCORED, "max_tokens": 0, "stop_token_ids": everything[:256]}
    [choice] = post(client, "/v1/completions", **body)["choices"]
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len("The old man") + 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "x"}),
        ("/v1/completions", {"model": "a", "prompt": "x"}),
        ("/v1/chat/completions", {"model": "a", "messages": MESSAGES}),
    ],
)
def test_no_tokens_without_an_echo_are_refused(client: TestClient, path: str, body: dict[str, Any]) -> None:
    reply = client.post(path, json={**body, "max_tokens": 0})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": MESSAGES})],
)
def test_a_time_that_runs_out_is_a_length_to_clients_that_know_openai_s_words(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    asked = {"model": "a", **body, "max_tokens": 400, "ignore_eos": True, "timeout_s": 0.02}
    whole = post(client, path, **asked)
    [choice] = whole["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "timeout")
    assert whole["usage"]["completion_tokens"] < 400
    last = streamed(client, path, **asked)[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("length", "timeout")
    del asked["timeout_s"]
    assert "stop_reason" not in post(client, path, **{**asked, "max_tokens": 2})["choices"][0]


def test_our_own_route_says_timeout(client: TestClient) -> None:
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "timeout_s": 0.02}
    assert post(client, "/generate", **body)["finish_reason"] == "timeout"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_server_that_stops_says_so_to_whom_it_was_answering(store: Store, path: str, stream: bool) -> None:
    with serving(store) as running, ThreadPoolExecutor(1) as pool:
        body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": stream}
        model = {"model": running.frozen.name} if path != "/generate" else {}
        loop = running.client.app.state.services.loop
        asked = pool.submit(running.client.post, path, json={**body, **model})
        while loop.stats().generated_tokens < 3:
            time.sleep(0.001)
        loop.stop()
        reply = asked.result()
    if stream:
        last = [line for line in reply.text.split("\n\n") if line.startswith("data: {")][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    else:
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.json()["error"]["code"] == "shutting_down"
