"""`antefix eval`: how well a prefix answers, measured on examples through a running server."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from prefix_store import examples
from prefix_store.cli import crowd, scores
from prefix_store.cli.client import NOT_ANTEFIX, Busy, Client, Failure, NoRoom, connect, fail, reference
from prefix_store.cli.terminal import printable
from prefix_store.errors import InvalidTrainingData
from prefix_store.examples import Example

REFERENCES = "references"


@dataclass(frozen=True)
class Case:
    """An example with what may be answered; `prompt` is what is asked, in `/generate`'s or the chat route's field."""

    number: int
    example: Example
    asked: dict[str, Any] | None
    references: list[str]


@dataclass(frozen=True)
class Outcome:
    """What came of a case. `nats`: -log p of its `tokens` that count, together. `no_room`: why it has no answer."""

    answer: str | None = None
    nats: float = 0.0
    tokens: int = 0
    no_room: str | None = None


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            help=f"JSONL, each line one of {examples.EXPECTED}; beside or instead of a completion may be a list of "
            "references.",
            exists=True,
            dir_okay=False,
        ),
    ],
    ref: Annotated[str | None, typer.Argument(help="A prefix: name or name@version. Without: the bare model.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help=f"With commas between. Default: {','.join(scores.METRICS)}; of texts, loss; of an encoder-decoder "
            "model, all but loss, which it does not have here."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens an answer.")] = 128,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Cut examples to so many tokens, as training does. Default: the context.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at a time.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write every example's answer and loss to this JSONL file.")] = None,
) -> None:
    """Measure a prefix on examples: answers are greedy; the loss is in nats per token that training would count.

    An example whose prompt leaves the context no room for an answer is not counted; then the exit status is 1.
    """
    cases = read_cases(data, limit)
    wanted = _metrics(metrics, cases)
    scores.check_installed(wanted)
    with connect() as server:
        model = server.get(_model(ref)) if ref is not None else _bare(server)
        asker = _Asker(server, model["id"], model["root"] if ref is not None else None, wanted, max_tokens, max_length)
        try:
            if "loss" in wanted and crowd.patiently(asker.has_source, cases[0]):
                wanted = _without_loss(metrics, cases)
                asker = replace(asker, metrics=wanted)
            outcomes = crowd.ask_all(cases, asker.ask, concurrency, "evaluating")
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise Failure(f"{NOT_ANTEFIX}: {error}") from error
    if out is not None:
        _write(out, cases, outcomes)
    without = {case.number: outcome.no_room for case, outcome in zip(cases, outcomes, strict=True) if outcome.no_room}
    if len(without) == len(cases):
        fail(f"no example has room for an answer; example {cases[0].number}: {outcomes[0].no_room}")
    found = {
        "model": model["id"],
        "prefix": model["root"] if ref is not None else None,
        "digest": model["digest"],
        "examples": len(cases) - len(without),
        "metrics": results(wanted, cases, outcomes),
        **({"no_room": list(without)} if without else {}),
    }
    typer.echo(json.dumps(found, indent=2) if as_json else printable(table(found)))
    if without:
        number, why = next(iter(without.items()))
        fail(f"{len(without)} of {len(cases)} examples had no room for an answer, and none is counted; {number}: {why}")


def read_cases(path: Path, limit: int | None = None) -> list[Case]:
    """What a file asks for. Ends the command with the first lines that are wrong."""
    found, faults = examples.parse(path.read_bytes(), _with_references)
    if faults:
        fail("\n".join(f"{path}, {fault}" for fault in faults))
    if not found:
        fail(f"{path} has no examples")
    return [_case(number, example) for number, example in enumerate(found[:limit], start=1)]


def results(metrics: list[str], cases: list[Case], outcomes: list[Outcome]) -> dict[str, Any]:
    """Every metric over all cases that had room: scores from 0 to 100, the loss in nats per token."""
    pairs = [(case, outcome) for case, outcome in zip(cases, outcomes, strict=True) if outcome.no_room is None]
    cases, outcomes = [case for case, _ in pairs], [outcome for _, outcome in pairs]
    found: dict[str, Any] = {}
    if set(metrics) & set(scores.TEXT_METRICS):
        answers = [(outcome.answer or "").strip() for outcome in outcomes]
        found |= scores.of_texts(metrics, answers, [case.references for case in cases])
    if "loss" in metrics:
        tokens = sum(outcome.tokens for outcome in outcomes)
        found |= {"loss": math.fsum(outcome.nats for outcome in outcomes) / tokens, "tokens": tokens}
    return found


def table(found: dict[str, Any]) -> str:
    """The result for people to read."""
    lines = [f"{found['prefix'] or 'the bare model ' + found['model']} on {found['examples']} examples"]
    for name, value in found["metrics"].items():
        shown = f"{value:,}" if name == "tokens" else f"{value:.4f}" if name == "loss" else f"{value:.2f}"
        lines.append(f"{name:8} {shown}")
    return "\n".join(lines)


def _metrics(asked: str | None, cases: list[Case]) -> list[str]:
    without = next((case for case in cases if case.asked is None), None)
    if asked is None:
        return ["loss"] if without else list(scores.METRICS)
    wanted = [name.strip() for name in asked.split(",")]
    for name in wanted:
        if name not in scores.METRICS:
            fail(f"--metrics takes {', '.join(scores.METRICS)} with commas between, got {name[:40]!r}")
    if without and wanted != ["loss"]:
        fail(f"example {without.number} is a text, which has no prompt to answer; ask for --metrics loss")
    return wanted


def _without_loss(asked: str | None, cases: list[Case]) -> list[str]:
    """What is measured of an encoder-decoder model, which scores only tokens that it chose itself."""
    without = next((case for case in cases if case.asked is None), None)
    if without is not None:
        fail(f"example {without.number} is a text, which has no part for an encoder to read")
    if asked is not None:
        others = ",".join(scores.TEXT_METRICS)
        fail(f"an encoder-decoder model has no loss here: no answer that it is given gets scores; ask for {others}")
    return list(scores.TEXT_METRICS)


def _with_references(line: Any) -> Example:
    """A canonical example that may have `references`; where it has no completion, the first of them stands for it."""
    if not isinstance(line, dict) or line.get(REFERENCES) is None:
        return examples.canonical(line)
    others = line.pop(REFERENCES)
    if not isinstance(others, list) or not others or "prompt" not in line:
        came = "an empty one" if others == [] else examples.kind(others)
        beside = "" if "prompt" in line else " without one"
        raise InvalidTrainingData(f"{REFERENCES} must be a list of texts beside a prompt, got {came}{beside}")
    texts = [examples.checked_text(f"{REFERENCES}[{place}]", text) for place, text in enumerate(others)]
    own = {"completion": texts[0]} if line.get("completion") is None else {}
    return examples.canonical({**line, **own}) | {REFERENCES: texts}


def _case(number: int, example: Example) -> Case:
    references = example.pop(REFERENCES, [])
    if "text" in example:
        return Case(number, example, None, [])
    if "prompt" in example:
        known = dict.fromkeys(text.strip() for text in [example["completion"], *references])
        return Case(number, example, {"prompt": example["prompt"]}, list(known))
    messages = example["messages"]
    last = max(place for place, message in enumerate(messages) if examples.is_learned(message))
    asked = [{name: value for name, value in message.items() if name != "weight"} for message in messages[:last]]
    return Case(number, example, {"messages": asked}, [messages[last]["content"].strip()])


def _model(ref: str) -> str:
    """Where a prefix is as a model, which takes no more than the scope to generate."""
    return reference(ref).replace("/prefixes/", "/models/", 1)


def _bare(server: Client) -> dict[str, Any]:
    models = server.get("/v1/models")["data"]
    if not models or models[0].get("parent") is not None:
        fail("this server does not serve the bare model: name a prefix")
    bare: dict[str, Any] = models[0]
    return bare


@dataclass(frozen=True)
class _Asker:
    """Asks a server about one case at a time, from any thread."""

    server: Client
    model: str
    prefix: str | None
    metrics: list[str]
    max_tokens: int
    max_length: int | None

    def ask(self, case: Case) -> Outcome:
        with _named(case):
            try:
                answer = self._answer(case) if set(self.metrics) & set(scores.TEXT_METRICS) else None
            except NoRoom as failure:
                return Outcome(no_room=str(failure))
            nats, tokens = self._loss(case) if "loss" in self.metrics else (0.0, 0)
        return Outcome(answer, nats, tokens)

    def has_source(self, case: Case) -> bool:
        """Whether the model is an encoder-decoder one, where what is asked is apart from the answer's tokens."""
        with _named(case):
            return any("source" in piece for piece in self._read(case))

    def _answer(self, case: Case) -> str:
        """Where `max_tokens` do not fit behind the prompt, as many as the server allows by itself, which do."""
        try:
            return self._answered(case, {"max_tokens": self.max_tokens})
        except NoRoom:
            return self._answered(case, {})

    def _answered(self, case: Case, at_most: dict[str, int]) -> str:
        assert case.asked is not None
        body = {**case.asked, **at_most, "temperature": 0}
        if "messages" in body:
            reply = self.server.post("/v1/chat/completions", json={**body, "model": self.prefix or self.model})
            return str(reply["choices"][0]["message"]["content"])
        return str(self.server.post("/generate", json={**body, "prefix_id": self.prefix})["text"])

    def _loss(self, case: Case) -> tuple[float, int]:
        """By the log-probabilities of the prompt that is the example; the server says which of its tokens count."""
        nats, count = 0.0, 0
        for piece in self._read(case):
            scored = {"prompt": piece["tokens"], "prefix_id": self.prefix, "echo": True, "logprobs": 0}
            reply = self.server.post("/generate", json={**scored, "max_tokens": 0, "temperature": 0})
            each = reply["logprobs"]["token_logprobs"]
            nats -= math.fsum(each[place] for place in piece["targets"])
            count += len(piece["targets"])
        return nats, count

    def _read(self, case: Case) -> list[dict[str, Any]]:
        """An example as training would read it."""
        body = {"model": self.prefix or self.model, "example": case.example, "max_length": self.max_length}
        read: list[dict[str, Any]] = self.server.post("/tokenize", json=body)["examples"]
        return read


@contextmanager
def _named(case: Case) -> Iterator[None]:
    """Around what is asked about a case, for a failure to say which."""
    try:
        yield
    except Busy:
        raise
    except Failure as failure:
        raise Failure(f"example {case.number}: {failure}") from failure


def _write(path: Path, cases: list[Case], outcomes: list[Outcome]) -> None:
    lines = []
    for case, outcome in zip(cases, outcomes, strict=True):
        shown: dict[str, Any] = {**case.example}
        if outcome.answer is not None:
            shown |= {REFERENCES: case.references, "answer": outcome.answer}
        if outcome.no_room is not None:
            shown |= {"no_room": outcome.no_room}
        if outcome.tokens:
            shown |= {"loss": outcome.nats / outcome.tokens, "tokens": outcome.tokens}
        lines.append(json.dumps(shown, ensure_ascii=False) + "\n")
    try:
        path.write_text("".join(lines), "utf-8")
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
