"""A server of an encoder-decoder model: the same routes, the prompt being what the encoder reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from prefix_store import codec
from prefix_store.geometry import Stack
from prefix_store.model import frozen as models
from prefix_store.model import sites
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixManifest
from prefix_store.store import Store
from prefix_store.tensors import STACKS
from server.app import create_app
from server.engine import batch
from server.engine.engine import Engine, choose_slots
from server.engine.prefix_loader import PrefixLoader
from server.scheduler.limits import Limits
from tests import pieces
from tests.models import CONTEXT, random_kvs, save_tiny, tiny_model
from tests.parity.harness import Case
from tests.parity.stacks import Prefix, alone
from tests.server import artefacts, loops
from tests.server.over_http import serving

P, NEW = 5, 8
PROMPT = "A king was there"
GREEDY = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "logprobs": 1}
Running = tuple[httpx.Client, FrozenModel]


@pytest.fixture(scope="module", params=["bart", "t5"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A whole server, its model from a folder, and a prefix of all stacks that came by upload."""
    folder = tmp_path_factory.mktemp(request.param)
    frozen = models.load(save_tiny(request.param, folder / "tiny"))
    with server_of(frozen, folder) as client:
        upload(client, "all", native(frozen))
        upload(client, "soft", artefacts.prompt(frozen, P))
        yield client, frozen


@contextmanager
def server_of(frozen: FrozenModel, folder: Path) -> Iterator[httpx.Client]:
    store = Store.open(f"sqlite:///{folder}/store.db")
    limits = Limits(choose_slots(frozen, 8, 1 << 28), 8, 64, frozen.context_length, 64)
    loop = loops.running(Engine(frozen, limits))
    app = create_app(store, frozen, loop, PrefixLoader(store.prefixes, frozen, 1 << 24))
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
    loop.stop()


def native(frozen: FrozenModel, stacks: tuple[Stack, ...] = tuple(Stack), seed: int = 0) -> bytes:
    manifest = PrefixManifest(Method.PREFIX, frozen.geometry, P, 0, frozen.digest, stacks=stacks)
    tensors = {STACKS[stack]: kv for stack, kv in random_kvs(frozen, P, seed=seed, stacks=stacks).items()}
    return codec.encode(manifest, tensors)


def upload(client: httpx.Client, name: str, file: bytes) -> None:
    client.post("/v1/prefixes", data={"id": name}, files={"file": ("f", file)}).raise_for_status()


def generate(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    reply = client.post("/generate", json={**GREEDY, **changes})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def refusal(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 400, reply.text
    found: dict[str, Any] = reply.json()["error"]
    return found


def soft_prompt() -> torch.Tensor:
    return torch.randn(P, 48, generator=torch.Generator().manual_seed(0))


def test_each_answer_is_transformers_own(running: Running) -> None:
    client, frozen = running
    plain = tiny_model(frozen.geometry.family)
    sites.mark(plain)
    source = tuple(frozen.tokenizer(PROMPT).input_ids)
    case = Case(frozen.start_ids, None, NEW, source=source)
    prefixes = {
        None: Prefix(),
        "all": Prefix(random_kvs(frozen, P, seed=0, stacks=tuple(Stack))),
        "soft": Prefix(embeds=soft_prompt()),
    }
    answers = set()
    for name, prefix in prefixes.items():
        reply = generate(client, prefix_id=name)
        assert reply["logprobs"]["token_ids"] == alone(plain, case, prefix)[0]
        virtual = P if name else 0
        assert reply["usage"] == {"prompt_tokens": len(source), "completion_tokens": NEW, "virtual_tokens": virtual}
        assert reply["finish_reason"] == "length"
        answers.add(tuple(reply["logprobs"]["token_ids"]))
    assert len(answers) == len(prefixes)


def test_a_stream_is_the_whole_answer_in_pieces(running: Running) -> None:
    client, _ = running
    whole = generate(client, prefix_id="all", prompt="Once")
    reply = client.post("/generate", json={**GREEDY, "prefix_id": "all", "prompt": "Once", "stream": True})
    blocks = [block.removeprefix("data: ") for block in reply.text.split("\n\n")][:-2]
    pieces = [json.loads(block) for block in blocks]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert pieces[-1]["usage"] == whole["usage"]


def test_openais_routes_answer_the_same(running: Running) -> None:
    client, frozen = running
    names = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert names == [frozen.name, "all", "soft"]
    for model, prefix in ((frozen.name, None), ("all", "all"), ("soft", "soft")):
        reply = client.post("/v1/completions", json={**GREEDY, "model": model}).json()
        assert reply["choices"][0]["text"] == generate(client, prefix_id=prefix)["text"]
        assert reply["choices"][0]["logprobs"]["text_offset"][0] == 0
        assert reply["usage"]["prompt_tokens"] == len(frozen.tokenizer(PROMPT).input_ids)


def test_an_answer_that_cannot_be_is_never_a_choice(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client, frozen = running
    monkeypatch.setattr(frozen.model.generation_config, "forced_eos_token_id", 1)
    asked = {"temperature": 1.0, "ignore_eos": False, "num_beams": 3, "n": 3}
    reply = generate(client, **asked, max_tokens=1)
    assert [(choice["text"], choice["finish_reason"]) for choice in reply["choices"]] == [("", "length")] * 3
    assert reply["usage"]["completion_tokens"] == 0
    longer = generate(client, **asked, max_tokens=2)
    assert len({tuple(choice["logprobs"]["token_ids"]) for choice in longer["choices"]}) == 3


def test_sampling_and_choices_are_as_ever(running: Running) -> None:
    client, _ = running
    drawn = {"temperature": 1.0, "seed": 5, "n": 3, "top_p": 0.9, "prefix_id": "all"}
    first, again = generate(client, **drawn), generate(client, **drawn)
    assert [choice["text"] for choice in first["choices"]] == [choice["text"] for choice in again["choices"]]
    assert len({choice["text"] for choice in first["choices"]}) == 3


def test_what_makes_no_sense_is_refused(running: Running) -> None:
    client, _frozen = running
    echo = refusal(client.post("/generate", json={**GREEDY, "echo": True}))
    assert (echo["param"], "does not follow its prompt" in echo["message"]) == ("echo", True)
    refusal(client.post("/v1/completions", json={**GREEDY, "model": "all", "echo": True, "max_tokens": 0}))
    chat = {"model": "all", "messages": [{"role": "user", "content": "hi"}]}
    assert "chat template" in refusal(client.post("/v1/chat/completions", json=chat))["message"]
    long = refusal(client.post("/generate", json={**GREEDY, "prompt": [5] * CONTEXT, "prefix_id": "soft"}))
    assert f"reads at most {CONTEXT} tokens; the request has {CONTEXT + P}, {P} of them" in long["message"]
    far = refusal(client.post("/generate", json={**GREEDY, "max_tokens": CONTEXT}))
    assert far["code"] == "context_length_exceeded"
    assert "encoder-decoder" in refusal(client.get("/v1/prefixes/all/inspect"))["message"]


@pytest.mark.parametrize("name", ["all", "soft"])
def test_verification_passes_and_sees_rows_that_read_anothers_source(
    running: Running, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = running
    found = client.post(f"/v1/prefixes/{name}/verify").json()
    assert found["ok"], found
    assert all(check["max_logprob_difference"] < 1e-4 for check in found["checks"])
    assert min(control["mean_logprob_difference"] for control in found["controls"]) > 1e-2
    items = batch.cross_items

    def misplaced(rows: Any) -> Any:
        return [replace(item, kv_hi=item.kv_hi - 1) if item.kv_hi - item.kv_lo > 1 else item for item in items(rows)]

    monkeypatch.setattr(batch, "cross_items", misplaced)
    found = client.post(f"/v1/prefixes/{name}/verify").json()
    assert [check["ok"] for check in found["checks"][:2]] == [False, False]


def test_the_whole_context_is_for_source_and_answer_each(running: Running) -> None:
    client, frozen = running
    most = frozen.context_length - len(frozen.start_ids)
    reply = generate(client, prompt=[7] * frozen.context_length, max_tokens=most)
    assert reply["usage"]["completion_tokens"] == most


def test_a_file_for_another_shape_of_encoder_is_refused(running: Running) -> None:
    client, _frozen = running
    other = models.load(models.BUNDLED)
    reply = client.post("/v1/prefixes", data={"id": "x"}, files={"file": ("f", artefacts.native(other, 3))})
    assert "does not fit this model" in refusal(reply)["message"]


def test_a_memory_is_refused(running: Running) -> None:
    client, frozen = running
    reply = client.post("/v1/prefixes", data={"id": "x"}, files={"file": ("f", artefacts.memory(frozen))})
    assert "prefix_plus is not defined for an encoder-decoder model" in refusal(reply)["message"]


def test_an_example_is_shown_as_training_reads_it(running: Running) -> None:
    client, frozen = running
    reply = client.post("/tokenize", json={"example": {"prompt": PROMPT, "completion": " seven"}}).json()
    (shown,) = reply["examples"]
    answer = frozen.tokenizer(" seven", add_special_tokens=False).input_ids
    assert shown["source"] == frozen.tokenizer(PROMPT).input_ids
    assert shown["tokens"][: len(frozen.start_ids) + len(answer)] == [*frozen.start_ids, *answer]
    assert shown["targets"][0] == len(frozen.start_ids)


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_a_published_marian_answers_in_the_text_that_transformers_makes_of_its_ids(tmp_path: Path) -> None:
    frozen = models.load(pieces.save_marian(tmp_path / "marian"))
    tokenizer, drawn = frozen.tokenizer, {"prompt": "the king was", "max_tokens": 24, "logprobs": 1}
    answers = set()
    with server_of(frozen, tmp_path) as client:
        for seed in range(4):
            reply = generate(client, **drawn, temperature=1.5, seed=seed)
            assert reply["text"] == tokenizer.decode(reply["logprobs"]["token_ids"], skip_special_tokens=True)
            answers.add(reply["text"])
        body = {"example": {"prompt": "the king was", "completion": "der König war"}}
        (shown,) = client.post("/tokenize", json=body).json()["examples"]
        assert generate(client, **drawn, temperature=0)["usage"]["prompt_tokens"] == len(shown["source"])
    assert len(answers) == 4
    assert shown["source"] == tokenizer("the king was").input_ids
    assert shown["tokens"] == [*frozen.start_ids, *tokenizer(text_target="der König war").input_ids]
