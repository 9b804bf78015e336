from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefix_store.cli import crowd
from prefix_store.model import apply
from prefix_store.model import frozen as models
from prefix_store.model.example import ExampleEncoder
from prefix_store.store import Store
from server.app import create_app
from server.engine.engine import Engine
from server.engine.prefix_loader import PrefixLoader
from server.scheduler.scheduler import Limits
from tests.models import random_kv
from tests.prefix_store.cli.conftest import ANSWER, Antefix, Instead, Running
from tests.server import artefacts, loops, over_http
from trainer.worker import Worker

WORDS = ("red", "blue", "green", "white", "black", "brown")
PAIRS = [{"prompt": f"a {word} hat", "completion": f" is {word}, very {word}"} for word in WORDS]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": f"You like {word}."},
            {"role": "user", "content": "Hats?"},
            {"role": "assistant", "content": f"Yes, {word} ones."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": "Now?"},
            {"role": "assistant", "content": f"Quite {word}."},
        ]
    }
    for word in WORDS
]
TEXTS = [{"text": f"The {word} hat stood on the {word} table, and nobody spoke."} for word in WORDS]
QUICK = {"virtual_tokens": 4, "steps": 6, "batch_size": 2}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module", autouse=True)
def published(running: Running) -> None:
    tensors = {"self.kv": random_kv(running.frozen, 4)}
    running.store.prefixes.save("default", "mine", artefacts.manifest(running.frozen), tensors)


def found(antefix: Antefix, *arguments: Any) -> dict[str, Any]:
    result = antefix("eval", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    metrics: dict[str, Any] = json.loads(result.stdout)
    return metrics


def test_answers_are_scored_beside_the_references(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    right = write(tmp_path / "d", [{"prompt": "a", "completion": "no"} | {"references": [ANSWER]}] * 3)
    wrong = write(tmp_path / "e", [{"prompt": "a", "completion": "something quite different"}] * 3)
    metrics = ("--metrics", "rouge,chrf")
    good, bad = (found(antefix, "mine", "--data", path, *metrics)["metrics"] for path in (right, wrong))
    assert good["chrf"] == pytest.approx(100)
    assert good["rougeL"] > 99 > 10 > bad["rougeL"]
    assert set(good) == {"chrf", "rouge1", "rouge2", "rougeL"}
    asked = running.loop.requests[-1]
    assert asked.params.is_greedy
    assert asked.params.max_tokens == 128
    assert asked.prefix is not None


def test_references_alone_are_enough_and_no_ref_is_the_bare_model(
    antefix: Antefix, running: Running, tmp_path: Path
) -> None:
    data = write(tmp_path / "d", [{"prompt": "a", "references": ["x", ANSWER]}] * 5)
    result = found(antefix, "--data", data, "--limit", 2, "--max-tokens", 40)
    assert (result["prefix"], result["model"], result["examples"]) == (None, "tiny-llama", 2)
    assert (result["metrics"]["loss"], result["metrics"]["tokens"]) == (pytest.approx(1.0), 4)  # x and its end, twice
    assert running.loop.requests[-1].prefix is None
    assert 40 in {request.params.max_tokens for request in running.loop.requests[-4:]}


def test_the_version_is_asked_for_once_and_kept(antefix: Antefix, tmp_path: Path) -> None:
    data = write(tmp_path / "d", PAIRS[:1])
    assert found(antefix, "mine", "--data", data, "--metrics", "loss")["prefix"] == "default/mine@1"
    result = antefix("eval", "mine", "--data", data, "--metrics", "loss")
    assert result.stdout.splitlines()[0] == "default/mine@1 on 1 examples"
    assert "loss     1.0000" in result.stdout


def test_every_example_is_written_where_one_asks_for_it(antefix: Antefix, tmp_path: Path) -> None:
    data = write(tmp_path / "d", PAIRS[:2])
    found(antefix, "mine", "--data", data, "--out", tmp_path / "out", "--concurrency", 1)
    lines = [json.loads(line) for line in (tmp_path / "out").read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [pair["prompt"] for pair in PAIRS[:2]]
    assert [(line["answer"], line["loss"]) for line in lines] == [(ANSWER, 1.0)] * 2
    assert lines[0]["references"] == ["is red, very red"]


@pytest.mark.parametrize(
    ("lines", "more", "said"),
    [
        ([PAIRS[0], {"prompt": "a"}], [], "d, line 2: expected an object"),
        (
            [{"prompt": "a", "references": []}],
            [],
            "references must be a list of texts beside a prompt, got an empty one",
        ),
        ([{"references": ["a"]}], [], "references must be a list of texts beside a prompt, got a list without one"),
        (
            [{"prompt": "a", "references": "b"}],
            [],
            "d, line 1: references must be a list of texts beside a prompt, got a",
        ),
        ([{"text": "a", "references": ["b"]}], [], "d, line 1: references must be a list of texts beside a prompt"),
        ([{"prompt": "a", "references": [3]}], [], "d, line 1: references[0] must be a text, got a number"),
        ([], [], "has no examples"),
        (TEXTS, ["--metrics", "bleu"], "example 1 is a text, which has no prompt to answer; ask for --metrics loss"),
        (
            PAIRS,
            ["--metrics", "bleu,accuracy"],
            "--metrics takes bleu, rouge, chrf, loss with commas between, got 'acc",
        ),
        (CHATS, ["--metrics", "loss"], "example 1: this model has no chat template"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    antefix: Antefix, tmp_path: Path, lines: list[Any], more: list[str], said: str
) -> None:
    result = antefix("eval", "mine", "--concurrency", "1", "--data", write(tmp_path / "d", lines), *more)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unknown_prefix_is_never_the_bare_model(antefix: Antefix, tmp_path: Path) -> None:
    data = write(tmp_path / "d", PAIRS)
    for name in ("missing", "../models", ""):
        assert antefix("eval", name, "--data", data).exit_code == 1


def small(request: httpx.Request) -> httpx.Response:
    """A server with a context of 50 letters, which answers in the 20 that it is asked for, or where absent 16."""
    body = json.loads(request.content or b"{}")
    if isinstance(asked := body.get("prompt"), str):
        most = body.get("max_tokens", max(1, min(16, 50 - len(asked))))
        if len(asked) + most > 50:
            error = {"message": f"{len(asked)} and {most} are too many", "code": "context_length_exceeded"}
            return httpx.Response(400, json={"error": error})
        return httpx.Response(200, json={"text": "b" * most})
    model = {"id": "m", "root": "m", "parent": None, "digest": "d"}
    examples = [{"tokens": [9, 5], "targets": [1]}]
    scores = {"token_logprobs": [None, -1.0]}
    return httpx.Response(200, json={"data": [model], "examples": examples, "logprobs": scores})


def test_an_example_without_room_costs_no_other(antefix: Antefix, instead: Instead, tmp_path: Path) -> None:
    instead(small)
    lengths = (5, 30, 31, 49, 50, 2000)
    data, out = write(tmp_path / "d", [{"prompt": "a" * n, "completion": "b" * 20} for n in lengths]), tmp_path / "out"
    result = antefix("eval", "--data", data, "--json", "--out", out, "--max-tokens", 20)
    shown = json.loads(result.stdout)
    assert (result.exit_code, shown["examples"], shown["no_room"]) == (1, 4, [5, 6])
    assert shown["metrics"]["tokens"] == 4
    assert "2 of 6 examples had no room for an answer, and none is counted; 5: 50 and 1 are too" in result.stderr
    assert result.stderr.count("\n") == 1
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [len(line.get("answer", "")) for line in lines] == [20, 20, 16, 1, 0, 0]
    assert [line.get("no_room") for line in lines] == [None] * 4 + ["50 and 1 are too many", "2000 and 1 are too many"]


def test_no_example_with_room_is_no_measurement(antefix: Antefix, instead: Instead, tmp_path: Path) -> None:
    instead(small)
    data = write(tmp_path / "d", [{"prompt": "a" * 60, "completion": "b"}] * 2)
    result = antefix("eval", "--data", data, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no example has room for an answer; example 1: 60 and 1 are too many" in result.stderr
    assert len((tmp_path / "out").read_text().splitlines()) == 2


def translating(request: httpx.Request) -> httpx.Response:
    """A server of an encoder-decoder model, which has no scores of a prompt."""
    body = json.loads(request.content or b"{}")
    if body.get("echo"):
        return httpx.Response(400, json={"error": {"message": "echo: an encoder-decoder model's answer does not"}})
    model = {"id": "m", "root": "m", "parent": None, "digest": "d"}
    examples = [{"tokens": [9, 5], "targets": [1], "source": [3]}]
    return httpx.Response(200, json={"data": [model], "text": "is red, very red", "examples": examples})


def test_an_encoder_decoder_model_is_measured_by_its_answers(
    antefix: Antefix, instead: Instead, tmp_path: Path
) -> None:
    instead(translating)
    metrics = found(antefix, "--data", write(tmp_path / "d", PAIRS[:1]))["metrics"]
    assert set(metrics) == {"bleu", "chrf", "rouge1", "rouge2", "rougeL"}
    assert metrics["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("lines", "more", "said"),
    [
        (PAIRS, ["--metrics", "bleu,loss"], "has no loss here: no answer that it is given gets scores; ask for bleu,"),
        (PAIRS[:1] + TEXTS, [], "example 2 is a text, which has no part for an encoder to read"),
    ],
)
def test_the_loss_of_an_encoder_decoder_model_is_refused(
    antefix: Antefix, instead: Instead, tmp_path: Path, lines: list[Any], more: list[str], said: str
) -> None:
    instead(translating)
    result = antefix("eval", "--data", write(tmp_path / "d", lines), *more)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def flaky(reply: Callable[[httpx.Request], httpx.Response]) -> Callable[[httpx.Request], httpx.Response]:
    """A server that is full every other time."""
    full = iter([True, False] * 1000)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and next(full):
            return httpx.Response(429, json={"error": {"message": "full"}}, headers={"retry-after": "3"})
        return reply(request)

    return answer


def test_a_full_server_is_asked_again(
    antefix: Antefix, instead: Instead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(crowd.time, "sleep", slept.append)
    model = {"id": "m", "root": "m", "parent": None, "digest": "d"}
    instead(flaky(lambda request: httpx.Response(200, json={"data": [model], "text": "is red, very red"})))
    result = found(antefix, "--data", write(tmp_path / "d", PAIRS[:1] * 3), "--metrics", "bleu")
    assert result["metrics"]["bleu"] == pytest.approx(100)
    assert slept == [3] * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server over the bundled model, whose worker has learned each shape of example."""
    store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('real')}/store.db")
    for name, lines in {"pairs": PAIRS, "chats": CHATS, "texts": TEXTS}.items():
        template = {"template": "Hats. {prompt}"} if name == "pairs" else {}
        store.jobs.submit("default", name, lines[:4], {**QUICK, **template}, validation=lines[3:])
    lines = []
    assert Worker(store, apply.attach(models.load(models.BUNDLED)), "w", say=lines.append).run_until_empty() == 3
    frozen = models.load(models.BUNDLED)
    loop = loops.running(Engine(frozen, Limits(4096, 8, 256, frozen.context_length, 100)))
    app = create_app(store, frozen, loop, PrefixLoader(store.prefixes, frozen, 1 << 24))
    with over_http.serving(app) as url:
        yield url


@pytest.fixture
def url(trained: str, antefix: Antefix, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of that server, which the commands then ask."""
    monkeypatch.setenv("ANTEFIX_URL", trained)
    return trained


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines"), [("pairs", PAIRS), ("chats", CHATS), ("texts", TEXTS)])
def test_the_loss_is_the_trainers_validation_loss(
    url: str,
    antefix: Antefix,
    tmp_path: Path,
    name: str,
    lines: list[Any],
) -> None:
    (job,) = [job for job in httpx.get(f"{url}/v1/jobs").json()["data"] if job["prefix_id"] == name]
    best = httpx.get(f"{url}/v1/jobs/{job['id']}/report").json()["best"]
    data = write(tmp_path / "d", lines[3:])
    served = found(antefix, name, "--data", data, "--metrics", "loss")["metrics"]["loss"]
    assert served == pytest.approx(best["valid_loss"], abs=1e-4)
    for other in [()] + [(wrong,) for wrong in ("pairs", "chats", "texts") if wrong != name]:
        assert abs(found(antefix, *other, "--data", data, "--metrics", "loss")["metrics"]["loss"] - served) > 1e-2


@pytest.mark.slow
def test_an_example_that_fills_the_context_is_read_as_training_reads_it(
    url: str, antefix: Antefix, tmp_path: Path
) -> None:
    """What is too long as well: its beginning is cut."""
    frozen = models.load(models.BUNDLED)
    encoder = ExampleEncoder(frozen.tokenizer, frozen.end_ids, "Hats. {prompt}")
    for prompt in ("a red hat " * 2000, "a red hat"):
        example = {"prompt": prompt, "completion": " is red"}
        result = found(antefix, "pairs", "--data", write(tmp_path / "d", [example]), "--metrics", "loss")
        (read,) = encoder.encode(example, frozen.context_length - QUICK["virtual_tokens"])
        body = {"model": "pairs", "example": example}
        assert httpx.post(f"{url}/tokenize", json=body).json()["examples"][0]["tokens"] == list(read.ids)
        assert result["metrics"]["tokens"] == len(read.targets)
        assert (len(read.ids) == frozen.context_length - QUICK["virtual_tokens"]) == (len(prompt) > 100)


@pytest.mark.slow
def test_a_finished_job_shows_answers_before_and_after(url: str, antefix: Antefix, tmp_path: Path) -> None:
    """The trainer's samples are what the server says, with the prefix and without it."""
    (job,) = [job for job in httpx.get(f"{url}/v1/jobs").json()["data"] if job["prefix_id"] == "pairs"]
    samples = httpx.get(f"{url}/v1/jobs/{job['id']}/report").json()["samples"]
    assert len(samples) == 3
    for sample, pair in zip(samples, PAIRS[3:], strict=True):
        assert sample["expected"] == pair["completion"]
        assert sample["prompt"] == f"Hats. {pair['prompt']}"
        for prefix, shown in (("pairs", "after"), (None, "before")):
            prompt = pair["prompt"] if prefix else sample["prompt"]
            body = {"prompt": prompt, "prefix_id": prefix, "max_tokens": 32, "temperature": 0}
            assert httpx.post(f"{url}/generate", json=body).json()["text"] == sample[shown]
        assert sample["before"] != sample["after"]
