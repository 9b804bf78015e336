"""Training examples as token ids, and which of them are to be learned.

What stands before an answer is encoded as serving encodes it, so that training and serving meet the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from prefix_store.errors import ChatTemplateMissing, InvalidRequest, InvalidTrainingData
from prefix_store.examples import is_learned
from prefix_store.model import prompt


@dataclass(frozen=True)
class TopTokens:
    """What a teacher holds likeliest at each token that counts, `[C, 20]`: `ids` int32, `probabilities` float16."""

    ids: torch.Tensor
    probabilities: torch.Tensor


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its completion; the first `prompt_length` (at least 1) are only conditioned on.

    `source`: for an encoder-decoder model, the prompt, which the encoder reads; `ids` are then the decoder's, the
    tokens that every answer begins with and the completion. `answers`: of a conversation with several, the places of
    each, in order; the first begins at `prompt_length`. `teacher`: what is to be learned instead of the tokens
    themselves.
    """

    ids: tuple[int, ...]
    prompt_length: int
    answers: tuple[range, ...] = ()
    teacher: TopTokens | None = dataclasses.field(default=None, compare=False, repr=False)
    source: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """All that the model goes through."""
        return len(self.source) + len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of what one stack goes through, which is what a context bounds."""
        return max(len(self.source), len(self.ids))

    @property
    def targets(self) -> Sequence[int]:
        """The places in `ids` of the tokens that count in the loss, in order, none of them the first."""
        return list(chain(*self.answers)) if self.answers else range(self.prompt_length, len(self.ids))


@dataclass(frozen=True)
class _Answer:
    """An assistant's message: what serving would encode before it, and what is learned.

    `certain`: how many tokens of the two the conversation goes on with; an end that the template does not write is not
    among them.
    """

    before: list[int]
    ids: list[int]
    certain: int

    @property
    def whole(self) -> list[int]:
        return self.before + self.ids


@dataclass(frozen=True)
class ExampleEncoder:
    """How examples become tokens: by serving's tokenizer, its templates, and the tokens that end an answer there.

    `template` stands around prompts. `chat_template` writes messages; None is the tokenizer's own. `start`: the tokens
    that every answer of an encoder-decoder model begins with, unseen; none is a decoder-only model.
    """

    tokenizer: Any
    ends: frozenset[int]
    template: str | None = None
    chat_template: str | None = None
    start: tuple[int, ...] = ()

    def encode(self, example: Mapping[str, Any], room: int) -> list[Example]:
        """A canonical example as one or more of at most `room` tokens, at least 2.

        Of a prompt too long its beginning is lost (BOS stays) and then the completion's end. What an encoder reads and
        what a decoder writes have `room` each, and lose their ends (EOS stays in the prompt). A text is cut into
        pieces, in which every token but its first counts once. A conversation is one example as far as it has room and
        its template goes on as it began; an answer where that ends begins another, with what is served before it, as
        does every answer behind an encoder. Raises ChatTemplateMissing and InvalidTrainingData.
        """
        try:
            if "text" in example:
                if self.start:
                    raise InvalidTrainingData(
                        "a text has no part for the encoder to read; expected a prompt and a completion",
                        param="examples",
                    )
                return self._text(example["text"], room)
            if "messages" in example:
                return self._conversation(example["messages"], room)
            before = prompt.encode(self.tokenizer, prompt.render(example["prompt"], self.template))
            return [self._cut(before, prompt.encode_completion(self.tokenizer, example["completion"]), room)]
        except (ChatTemplateMissing, InvalidTrainingData):
            raise
        except InvalidRequest as error:
            raise InvalidTrainingData(error.message, param="examples") from None

    def _text(self, text: str, room: int) -> list[Example]:
        ids = prompt.ended(self.tokenizer, prompt.encode(self.tokenizer, text))
        if len(ids) < 2:
            raise InvalidTrainingData("the text is a single token, and nothing is left to predict", param="examples")
        if ids[0] == self.tokenizer.bos_token_id:
            pieces = [[ids[0], *ids[start : start + room - 1]] for start in range(1, len(ids), room - 1)]
        else:
            pieces = [ids[start : start + room] for start in range(0, len(ids) - 1, room - 1)]
        return [Example(tuple(piece), 1) for piece in pieces]

    def _conversation(self, messages: Sequence[Mapping[str, Any]], room: int) -> list[Example]:
        shown = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
        found: list[Example] = []
        last: _Answer | None = None
        for place, message in enumerate(messages):
            if not is_learned(message):
                continue
            answer = self._answer(shown[: place + 1])
            if not self.start and last is not None and len(answer.whole) <= room and _goes_on(last, answer):
                found[-1] = _joined(found[-1], last, answer)
            else:
                found.append(self._cut(answer.before, answer.ids, room))
            last = answer
        return found

    def _answer(self, messages: Sequence[Mapping[str, Any]]) -> _Answer:
        """The last message as an answer to those before it."""
        asked = prompt.render_chat(self.tokenizer, messages[:-1], self.chat_template)
        whole = prompt.render_chat(self.tokenizer, messages, self.chat_template, answered=True).rstrip()
        where = f"messages[{len(messages) - 1}]"
        if not whole.startswith(asked):
            raise InvalidTrainingData(
                f"{where}: the chat template writes this answer behind another text than the one it asks for it with, "
                "so which tokens are the answer's cannot be told",
                param="examples",
            )
        if messages[-1]["content"].strip() not in whole[len(asked) :]:
            raise InvalidTrainingData(f"{where}: the chat template does not keep this answer's text", param="examples")
        before = prompt.encode(self.tokenizer, asked, special_tokens=False)
        ids = prompt.encode(self.tokenizer, whole, special_tokens=False)
        if prompt.has_two_sides(self.tokenizer):
            ids = prompt.encode_answer(self.tokenizer, whole[len(asked) :])
        elif ids[: len(before)] == before:
            ids = ids[len(before) :]
        else:  # the answer's first letters and the template's last would be one token, which serving never sees
            ids = prompt.encode(self.tokenizer, whole[len(asked) :], special_tokens=False)
        end = next((place for place, token in enumerate(ids, start=1) if token in self.ends), None)
        if end is not None:
            return _Answer(before, ids[:end], len(before) + end)
        return _Answer(before, prompt.ended(self.tokenizer, ids), len(before) + len(ids))

    def _cut(self, before: list[int], answer: list[int], room: int) -> Example:
        if self.start:
            source = _keep_start(before, room, self.tokenizer.eos_token_id)
            return Example((*self.start, *answer)[:room], len(self.start), source=tuple(source))
        before = _keep_end(before, max(1, room - len(answer)), self.tokenizer.bos_token_id)
        return Example(tuple(before + answer)[:room], len(before))


def _goes_on(last: _Answer, answer: _Answer) -> bool:
    """Whether all that was encoded stands at the beginning of what comes next, token for token."""
    certain = last.whole[: last.certain]
    return answer.before[: last.certain] == certain


def _joined(example: Example, last: _Answer, answer: _Answer) -> Example:
    answers = example.answers or (range(example.prompt_length, last.certain),)
    begun = (*answers[:-1], range(answers[-1].start, last.certain))
    return Example(tuple(answer.whole), example.prompt_length, (*begun, range(len(answer.before), len(answer.whole))))


def _keep_start(ids: list[int], room: int, eos: int | None) -> list[int]:
    if len(ids) <= room:
        return ids
    return [*ids[: room - 1], eos] if eos is not None and ids[-1] == eos else ids[:room]


def _keep_end(ids: list[int], room: int, bos: int | None) -> list[int]:
    if len(ids) <= room:
        return ids
    if ids[0] == bos:
        return [ids[0], *ids[len(ids) - (room - 1) :]]
    return ids[-room:]
