"""OpenAI's own client against a real server: what it reads is what `/generate` answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from prefix_store.errors import GenerationFailed
from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from prefix_store.tenants import DEFAULT_TENANT
from server.app import create_app
from server.engine.engine import Engine
from server.engine.prefix_loader import PrefixLoader
from server.scheduler.scheduler import Limits
from tests.models import tiny_frozen
from tests.server import artefacts, loops
from tests.server.conftest import ANSWER
from tests.server.fakes import FakeLoop
from tests.server.over_http import serving

openai = pytest.importorskip("openai")
Client = Any

LIMITS = Limits(slots=4096, rows=16, step_tokens=64, context_length=512, waiting=64)
CHAT = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant]"
MOST = 16
MODELS = {"tiny-llama": None, "support": "support", "default/support@1": "support@1"}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "nearly zero": {"temperature": 1e-300},
    "drawn": {"temperature": 0.9, "top_p": 0.9, "seed": 7},
    "penalised": {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    "biased": {"temperature": 0, "logit_bias": {"80": 60, "90": 60}, "stop": ["nn"]},
    "vllm's": {"seed": 3, "top_k": 5, "min_p": 0.02, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 3},
}
EXTRA = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens")


@contextmanager
def opened(url: str, key: str = "none") -> Iterator[Client]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A whole server with one prefix, which frames what it is asked."""
    store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('run')}/store.db")
    frozen = tiny_frozen("llama")
    engine = loops.running(Engine(frozen, LIMITS))
    publish(store, frozen, template="Q: {prompt} A:")
    app = create_app(store, frozen, engine, PrefixLoader(store.prefixes, frozen, 1 << 24), chat_template=CHAT)
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def client(real: str) -> Iterator[Client]:
    with opened(real) as made:
        yield made


@pytest.fixture
def scripted(store: Store, frozen: FrozenModel, loop: FakeLoop) -> Iterator[str]:
    """A server whose answer is known."""
    app = create_app(store, frozen, loop, PrefixLoader(store.prefixes, frozen, 1 << 20), chat_template=CHAT)
    with serving(app) as url:
        yield url


@pytest.fixture
def known(scripted: str) -> Iterator[Client]:
    with opened(scripted) as made:
        yield made


def publish(store: Store, frozen: FrozenModel, name: str = "support", length: int = 6, **changes: Any) -> None:
    manifest = artefacts.manifest(frozen, length, **changes)
    store.prefixes.save(DEFAULT_TENANT, name, manifest, {"self.kv": artefacts.random_kv(frozen, length)})


def generated(url: str, model: str, prompt: str | list[int], settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": MOST, **settings, **more}
    if MODELS[model] is not None:
        body["prefix_id"] = MODELS[model]
    reply = httpx.post(f"{url}/generate", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def split(settings: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's own fields as arguments, the others as `extra_body`."""
    extra = {name: value for name, value in settings.items() if name in EXTRA}
    return {name: value for name, value in settings.items() if name not in EXTRA} | {"extra_body": extra}


@pytest.mark.parametrize(
    ("model", "settings"),
    [(model, name) for model in ("tiny-llama", "support") for name in SETTINGS] + [("default/support@1", "greedy")],
)
def test_a_completion_is_what_generate_answers_streamed_or_not(
    client: Client, real: str, model: str, settings: str
) -> None:
    expected = generated(real, model, "The king", SETTINGS[settings])
    asked = {"model": model, "prompt": "The king", "max_tokens": MOST, **split(SETTINGS[settings])}
    whole = client.completions.create(**asked)
    *pieces, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert whole.choices[0].text == expected["text"] == "".join(piece.choices[0].text for piece in pieces)
    assert whole.choices[0].finish_reason == expected["finish_reason"] == pieces[-1].choices[0].finish_reason
    assert whole.prefix == expected["prefix"] == last.prefix
    for usage in (whole.usage, last.usage):
        assert {name: getattr(usage, name) for name in expected["usage"]} == expected["usage"]
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_prefix_decides_the_answer(client: Client) -> None:
    """Without this, answers that agree would say nothing about prefixes."""
    asked = {"prompt": "Q: The king A:", "max_tokens": MOST, "temperature": 0}
    bare, tuned = (client.completions.create(model=model, **asked) for model in ("tiny-llama", "support"))
    ids = bare.usage.prompt_tokens
    assert bare.choices[0].text != tuned.choices[0].text
    assert (bare.prefix, bare.usage.virtual_tokens) == (None, 0)
    assert (tuned.prefix["id"], tuned.prefix["version"], tuned.usage.virtual_tokens) == ("support", 1, 6)
    assert tuned.usage.prompt_tokens == ids + len("Q:  A:")  # its template, and none of its virtual tokens
    assert bare.system_fingerprint != tuned.system_fingerprint


def test_a_batch_answers_each_prompt_as_alone(client: Client) -> None:
    asked = {"model": "support", "max_tokens": 8, "seed": 5, "n": 2}
    for batch in (["The king", "A queen"], [[40, 50], [60, 70, 80]]):
        together = client.completions.create(prompt=batch, **asked)
        assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
        alone = [client.completions.create(prompt=prompt, **asked) for prompt in batch]
        assert [c.text for c in together.choices] == [c.text for reply in alone for c in reply.choices]
        assert together.usage.prompt_tokens == sum(reply.usage.prompt_tokens for reply in alone)
        streamed = ["", "", "", ""]
        for chunk in client.completions.create(prompt=batch, stream=True, **asked):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == [choice.text for choice in together.choices]


@pytest.mark.parametrize("model", ["tiny-llama", "support"])
def test_a_chat_is_what_generate_answers_to_the_rendered_messages(client: Client, real: str, model: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    ids = list(b"[system] Be brief.\n[user] Hi\n[assistant]")
    shown = httpx.post(f"{real}/tokenize", json={"messages": messages}).json()
    assert shown["count"] == len(ids)
    expected = generated(real, model, shown["tokens"], SETTINGS["drawn"])
    asked = {"model": model, "messages": messages, "max_completion_tokens": MOST, **SETTINGS["drawn"]}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == expected["text"]
    assert whole.choices[0].finish_reason == expected["finish_reason"]
    assert whole.prefix == expected["prefix"]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected["text"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == expected["finish_reason"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_scoring_a_prompt_as_evaluation_clients_do(client: Client) -> None:
    """Batched token ids, one token more than is scored, and equality of floats as the test of what is likeliest."""
    batch = [[40, 50, 60, 70], [41, 51, 61]]
    asked = {
        "model": "support",
        "prompt": batch,
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
        "seed": 1,
    }
    plain = client.completions.create(**asked)
    ends = client.completions.create(**asked, logit_bias={"1": 100})  # the end of the text is what comes next
    for reply in (plain, ends):
        for choice, ids in zip(reply.choices, batch, strict=True):
            scores = choice.logprobs
            assert scores.token_ids[: len(ids)] == ids
            assert len(scores.token_ids) == len(scores.token_logprobs) == len(ids) + 1
            assert (scores.token_logprobs[0], scores.top_logprobs[0]) == (None, None)
            for logprob, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
                assert logprob in top.values()
    assert [c.logprobs.token_logprobs[:-1] for c in plain.choices] == [
        c.logprobs.token_logprobs[:-1] for c in ends.choices
    ]
    greedy = [choice.logprobs.token_ids[-1] for choice in plain.choices]
    scored = client.completions.create(**{**asked, "prompt": [[*i, t] for i, t in zip(batch, greedy, strict=True)]})
    for choice in scored.choices:
        assert choice.logprobs.token_logprobs[-2] == max(choice.logprobs.top_logprobs[-2].values())
    assert [choice.finish_reason for choice in ends.choices] == ["stop", "stop"]


@pytest.mark.parametrize("stop", [None, "wör", ["ö", "你"], "好 😀", "\U0001f600"])
def test_pieces_join_to_the_whole_across_characters_and_stop_strings_of_several_tokens(
    known: Client, stop: Any
) -> None:
    asked = {"model": "tiny-llama", "stop": stop, "max_tokens": 64}
    cut = min((ANSWER.index(text) for text in ([stop] if isinstance(stop, str) else stop or [])), default=len(ANSWER))
    whole = known.completions.create(prompt="hi", **asked)
    pieces = [chunk.choices[0].text for chunk in known.completions.create(prompt="hi", stream=True, **asked)]
    assert whole.choices[0].text == "".join(pieces) == ANSWER[:cut]
    messages = [{"role": "user", "content": "hi"}]
    told = known.chat.completions.create(messages=messages, **asked)
    chunks = known.chat.completions.create(messages=messages, stream=True, **asked)
    assert told.choices[0].message.content == ANSWER[:cut]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER[:cut]


def test_a_new_prefix_is_a_model_at_once_under_every_form_of_its_name(real: str, client: Client) -> None:
    file = artefacts.native(tiny_frozen("llama"), 5, seed=9)
    form = {"data": {"id": "fresh"}, "files": {"file": ("f", file)}}
    assert "fresh" not in [model.id for model in client.models.list()]
    begun = time.monotonic()
    version = httpx.post(f"{real}/v1/prefixes", **form).json()
    assert [model.id for model in client.models.list()] == ["tiny-llama", "fresh", "support"]
    for name in ("fresh", "fresh@1", "default/fresh", "default/fresh@1"):
        model = client.models.retrieve(name)  # the client sends / and @ in percent form
        assert (model.id, model.object, model.parent, model.digest) == (name, "model", "tiny-llama", version["digest"])
        assert model.max_model_len == 512 - 5
        reply = client.completions.create(model=name, prompt="x", max_tokens=1)
        assert (reply.model, reply.prefix["digest"]) == (name, version["digest"])
    assert time.monotonic() - begun < 20
    assert client.models.delete("default/fresh").deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("fresh")
    assert [model.id for model in client.models.list()] == ["tiny-llama", "support"]


def test_errors_are_the_clients_own_classes_with_their_codes(client: Client) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4o", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="support", prompt=[5] * 500, max_tokens=7)
    assert long.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 512" in str(long.value)
    assert client.completions.create(model="support", prompt=[5] * 500, max_tokens=6).usage.prompt_tokens == 500
    assert client.completions.create(model="tiny-llama", prompt=[5] * 500, max_tokens=7)  # it takes no room itself
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="support", messages=[{"role": "user", "content": "x"}], temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as large:
        client.completions.create(model="support", prompt="x", top_p=2.0, stream=True)
    assert large.value.param == "top_p"


def test_a_failure_in_mid_stream_is_the_clients_error(scripted: str, known: Client, loop: FakeLoop) -> None:
    loop.failure = GenerationFailed("the step broke")
    with pytest.raises(openai.APIError) as broken:
        list(known.completions.create(model="tiny-llama", prompt="x", stream=True, max_tokens=64))
    assert (broken.value.code, broken.value.message) == ("generation_failed", "the step broke")
    with pytest.raises(openai.InternalServerError):
        known.chat.completions.create(model="tiny-llama", messages=[{"role": "user", "content": "x"}], max_tokens=64)


def test_a_wrong_key_is_told_by_its_code(scripted: str, store: Store) -> None:
    key, _ = store.keys.create(DEFAULT_TENANT, ["generate"])
    with opened(scripted, key) as client:
        assert client.models.list().data[0].id == "tiny-llama"
        assert client.completions.create(model="tiny-llama", prompt="x").choices[0].text
        with pytest.raises(openai.PermissionDeniedError):
            client.models.delete("support")
    with opened(scripted, "afx_wrong") as stranger, pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_client_that_leaves_in_mid_stream_ends_the_work(known: Client, loop: FakeLoop) -> None:
    loop.hold.clear()
    stream = known.completions.create(model="tiny-llama", prompt="x", stream=True, max_tokens=64)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while not loop.aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loop.aborted == [loop.requests[0].id]
