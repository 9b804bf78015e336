"""Beam search over HTTP, in front of a real engine: what the routes take, answer, stream and refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from prefix_store.store import Store
from server.scheduler.limits import Limits
from tests.models import VOCABULARY, tiny_model
from tests.server import artefacts
from tests.server.live import Live, serving

PROMPT = [0, 40, 41, 42]
LIMITS = Limits(slots=2048, rows=8, step_tokens=64, context_length=512, waiting=100)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('beams') / Path('store.db')}")
    with serving(store, limits=LIMITS, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}") as found:
        found.publish("support", artefacts.native(found.frozen))
        yield found
    store.close()


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return tiny_model("llama")


def post(live: Live, route: str, status: int = 200, **body: Any) -> dict[str, Any]:
    reply = live.client.post(route, json=body)
    assert reply.status_code == status, reply.text
    found: dict[str, Any] = reply.json()
    return found


def by_transformers(plain: PreTrainedModel, live: Live, prompt: list[int], new: int, beams: int, **more) -> list[str]:
    ids = torch.tensor([prompt])
    found = plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=VOCABULARY - 1,
        **more,
    )
    return [live.frozen.tokenizer.decode(row[len(prompt) :], skip_special_tokens=True) for row in found]


def test_n_choices_are_the_n_best_in_order(live: Live, plain: PreTrainedModel) -> None:
    asked = {"max_tokens": 12, "num_beams": 4, "length_penalty": 0.5, "early_stopping": "never", "min_tokens": 3}
    options = {"length_penalty": 0.5, "early_stopping": "never", "min_new_tokens": 3}
    expected = by_transformers(plain, live, PROMPT, 12, 4, **options)
    assert len(set(expected)) > 2
    reply = post(live, "/generate", prompt=PROMPT, n=3, **asked)
    assert [choice["text"] for choice in reply["choices"]] == expected[:3]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["text"] == expected[0]
    assert reply["usage"]["prompt_tokens"] == 4
    alone = post(live, "/generate", prompt=PROMPT, **asked)
    assert (alone["text"], "choices" in alone) == (expected[0], False)
    model = {"model": live.frozen.name}
    reply = post(live, "/v1/completions", prompt=[PROMPT, PROMPT[:2]], n=2, **model, **asked)
    texts = [choice["text"] for choice in reply["choices"]]
    assert texts == expected[:2] + by_transformers(plain, live, PROMPT[:2], 12, 4, **options)[:2]
    messages = [{"role": "user", "content": "abc"}]
    chat = post(live, "/v1/chat/completions", messages=messages, n=4, **model, **asked)
    ids = live.frozen.tokenizer("abc", add_special_tokens=False).input_ids
    assert [choice["message"]["content"] for choice in chat["choices"]] == by_transformers(
        plain, live, ids, 12, 4, **options
    )


def test_a_prefix_is_searched_behind(live: Live) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 8, "num_beams": 3}
    reply = post(live, "/generate", prefix_id="support", **asked)
    assert reply["prefix"]["id"] == "support"
    assert reply["text"] != post(live, "/generate", **asked)["text"]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_sends_each_choice_whole_at_the_end(live: Live, n: int) -> None:
    body = {"prompt": PROMPT, "max_tokens": 9, "num_beams": 3, "n": n, "logprobs": 1, "echo": True}
    whole = post(live, "/generate", **body)
    blocks = live.client.post("/generate", json={**body, "stream": True}).text.split("\n\n")[:-2]
    events = [json.loads(block.removeprefix("data: ")) for block in blocks]
    told = [event for event in events if event["finish_reason"]]
    assert [event["index"] for event in told] == list(range(n))
    assert len(events) == n
    choices = whole.get("choices", [whole])
    assert [event["text"] for event in told] == [choice["text"] for choice in choices]
    assert [event["logprobs"] for event in told] == [choice["logprobs"] for choice in choices]
    assert [event for event in events if "usage" in event] == events[-1:]
    assert events[-1]["usage"] == whole["usage"]


def test_the_seed_changes_nothing_and_neither_does_a_temperature_of_0(live: Live) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 8, "num_beams": 3}
    first = post(live, "/generate", **asked)["text"]
    for more in ({"seed": 5}, {"temperature": 0}, {"seed": 6, "temperature": 1}):
        assert post(live, "/generate", **asked, **more)["text"] == first


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 9}, "num_beams"),  # more than the server has rows
        ({"num_beams": 7, "max_tokens": 500}, "num_beams"),  # more than its slots
        ({"num_beams": 2, "n": 3}, "n"),
        ({"num_beams": 2, "temperature": 0.7}, "temperature"),
        ({"num_beams": 2, "top_p": 0.9}, "top_p"),
        ({"num_beams": 2, "stop": "x"}, "stop"),
        ({"num_beams": 2, "stop": []}, None),
        ({"num_beams": 2, "response_format": {"type": "text"}}, None),
        ({"num_beams": 2, "response_format": {"type": "json_object"}}, "response_format"),
        ({"num_beams": 2, "structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping"),
        ({"num_beams": 2, "max_tokens": 0, "echo": True}, "max_tokens"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"beams": 2}, "beams"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(live: Live, body: dict[str, Any], param: str | None) -> None:
    reply = live.client.post("/generate", json={"prompt": PROMPT, "max_tokens": 4, **body})
    assert reply.status_code == (200 if param is None else 400), reply.text
    if param is not None:
        assert reply.json()["error"]["param"] == param
    assert not live.engine.scheduler.running


def test_a_timeout_gives_the_best_so_far(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = live.engine.scheduler
    expire = scheduler.expire
    monkeypatch.setattr(scheduler, "expire", lambda: expire() if _generated(scheduler) > 5 else [])
    reply = post(live, "/generate", prompt=PROMPT, max_tokens=400, num_beams=3, n=3, ignore_eos=True, timeout_s=0.001)
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"timeout"}
    assert reply["usage"]["completion_tokens"] >= 3 * 5


def _generated(scheduler: Any) -> int:
    return max((sequence.generated for sequence in scheduler.running), default=0)
