"""What `vllm bench serve` sends, replayed for the command on the page, and read as it reads it.

vLLM itself is not here: these are the requests of its `openai` and `openai-chat` backends, field by field.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.clients.calls import BASE, WRONG, generated
from tests.docs import page
from tests.e2e.processes import Running

pytestmark = pytest.mark.slow
TEXTS = {"/v1/completions": lambda choice: choice["text"], "/v1/chat/completions": lambda c: c["delta"].get("content")}


@dataclass(frozen=True)
class Read:
    """What the benchmark takes from a stream: it counts a reply without a chunk that has choices as failed."""

    text: str
    chunks: int
    usage: dict[str, int]
    request_id: str


@pytest.fixture(scope="module")
def options(url: str) -> argparse.Namespace:
    """Those of the page's command."""
    command = page.block("clients.md", "vLLM's benchmark", "console", url)
    program, *rest = shlex.split(command.removeprefix("$ "))
    assert (program, rest[:2]) == ("vllm", ["bench", "serve"])
    parser = argparse.ArgumentParser()
    for name in ("backend", "base-url", "model", "tokenizer", "dataset-name"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("random-input-len", "random-output-len", "num-prompts"):
        parser.add_argument(f"--{name}", required=True, type=int)
    parser.add_argument("--lora-modules", nargs="+", required=True)
    parser.add_argument("--temperature", type=float, required=True)
    return parser.parse_args(rest[2:])


@pytest.fixture(scope="module")
def prompts(server: Running, options: argparse.Namespace) -> list[str]:
    """The random data set: ids drawn at random, as text, and cut again to the length that the server counts."""
    drawn, found = random.Random(0), []
    for _ in range(options.num_prompts):
        ids = [drawn.randrange(2, 6000) for _ in range(options.random_input_len)]
        text = detokenized(server.client, options.model, ids)
        counted = tokenized(server.client, options.model, text)
        found.append(detokenized(server.client, options.model, counted[: options.random_input_len]))
    return found


def tokenized(client: httpx.Client, model: str, text: str) -> list[int]:
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    ids: list[int] = client.post("/tokenize", json=body).raise_for_status().json()["tokens"]
    return ids


def detokenized(client: httpx.Client, model: str, ids: list[int]) -> str:
    reply = client.post("/detokenize", json={"model": model, "tokens": ids}).raise_for_status()
    text: str = reply.json()["prompt"]
    return text


def completion(model: str, prompt: str | list[int], length: int, **extra: Any) -> dict[str, Any]:
    """The body of the `openai` backend; a random data set brings `ignore_eos`."""
    return {
        "model": model,
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": length,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **extra,
    }


def chat(model: str, prompt: str, length: int, **extra: Any) -> dict[str, Any]:
    """The body of the `openai-chat` backend."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
        "max_completion_tokens": length,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **extra,
    }


def read(client: httpx.Client, path: str, body: dict[str, Any], request_id: str = "bench-0") -> Read:
    text, chunks, usage = "", 0, {}
    with client.stream("POST", path, json=body, headers={"x-request-id": request_id}) as reply:
        assert reply.status_code == 200, reply.read()
        *events, last, rest = "".join(reply.iter_text()).split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    for event in events:
        assert event.startswith("data: ")
        found = json.loads(event.removeprefix("data: "))
        if choices := found["choices"]:
            chunks += 1
            text += TEXTS[path](choices[0]) or ""
        elif found["usage"]:
            usage = found["usage"]
    assert chunks > 0, "it would be counted as failed"
    return Read(text, chunks, usage, reply.headers["x-request-id"])


def test_the_pages_example(server: Running, options: argparse.Namespace, prompts: list[str]) -> None:
    """All requests at once, each of a prefix drawn at random: each gets the answer that it gets alone."""
    drawn = random.Random(1)
    models = [drawn.choice(options.lora_modules) for _ in prompts]
    assert len(set(models)) == len(options.lora_modules) > 1
    length, greedy = options.random_output_len, {"temperature": options.temperature}

    def send(number: int) -> Read:
        body = completion(models[number], prompts[number], length, **greedy)
        return read(server.client, "/v1/completions", body, f"bench-{number}")

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(send, range(len(prompts))))
    for number, (model, prompt, answer) in enumerate(zip(models, prompts, answers, strict=True)):
        assert answer.text == generated(server.client, model, prompt, max_tokens=length, ignore_eos=True)
        counted = len(server.client.post("/tokenize", json={"prompt": prompt}).json()["tokens"])
        assert (answer.usage["completion_tokens"], answer.usage["prompt_tokens"]) == (length, counted)
        assert answer.request_id == f"bench-{number}"


@pytest.mark.parametrize("model", [BASE, "plays"])
def test_the_other_requests_of_the_benchmark(server: Running, model: str, prompts: list[str]) -> None:
    client, prompt = server.client, prompts[0]
    greedy = {"temperature": 0.0}
    expected = generated(client, model, prompt, max_tokens=12, ignore_eos=True)
    scored = read(client, "/v1/completions", completion(model, prompt, 12, logprobs=5, **greedy))
    assert scored.text == expected
    # a timed trace comes as token ids, and brings no text
    ids = tokenized(client, model, prompt)
    traced = read(client, "/v1/completions", completion(model, ids, 12, **greedy))
    assert traced.text == generated(client, model, ids, max_tokens=12, ignore_eos=True)
    assert traced.usage["prompt_tokens"] == len(ids)
    # without a temperature the server's own holds; the lengths are what is asked for all the same
    sampled = read(client, "/v1/completions", completion(model, prompt, 12, top_p=0.9, top_k=20, min_p=0.05))
    assert sampled.usage["completion_tokens"] == 12
    probe = read(client, "/v1/completions", completion(model, "Hi", 1))
    assert probe.usage["completion_tokens"] == 1
    said = read(client, "/v1/chat/completions", chat(model, prompt, 12, **greedy))
    messages = [{"role": "user", "content": prompt}]
    rendered = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert said.text == generated(client, model, rendered, max_tokens=12, ignore_eos=True)


def test_what_it_asks_before_and_after(server: Running) -> None:
    first = server.client.get("/v1/models").raise_for_status().json()["data"][0]
    assert (first["id"], first["root"]) == (BASE, BASE)
    assert server.client.get("/metrics").status_code == 200


def test_a_wrong_name_fails_with_a_reason(server: Running) -> None:
    """All that the benchmark shows of an error is the status line."""
    for path, body in (("completions", completion(WRONG, "Hi", 1)), ("chat/completions", chat(WRONG, "Hi", 1))):
        reply = server.client.post(f"/v1/{path}", json=body)
        assert (reply.status_code, reply.reason_phrase) == (404, "Not Found")
        assert reply.json()["error"]["code"] == "model_not_found"
