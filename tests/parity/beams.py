"""Beam searches for the parity tests: drawn at random, run in an engine, and what transformers found."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateBeamEncoderDecoderOutput

from server.engine.engine import Engine
from server.scheduler.messages import FinishReason, GenerationRequest, Hypothesis, PrefixPayload, TokenEvent
from server.scheduler.sampling_params import SamplingParams
from tests.models import EOS, VOCABULARY

Found = GenerateBeamDecoderOnlyOutput | GenerateBeamEncoderDecoderOutput


@dataclass(frozen=True)
class Search:
    """A beam search as transformers takes it, and when it arrives."""

    prompt: tuple[int, ...]
    num_beams: int
    new: int
    least: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float = 1.0
    end_bias: float = 0.0
    ends: tuple[int, ...] = (EOS,)
    prefix: int = 0
    arrives: int = 0

    def options(self) -> dict[str, Any]:
        """What `generate` takes."""
        options: dict[str, Any] = {
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_beams,
            "do_sample": False,
            "max_new_tokens": self.new,
            "min_new_tokens": self.least or None,
            "length_penalty": self.length_penalty,
            "early_stopping": self.early_stopping,
            "eos_token_id": list(self.ends) or None,
            "pad_token_id": VOCABULARY - 1,
            "return_dict_in_generate": True,
            "output_scores": True,
        }
        if self.end_bias:
            options["sequence_bias"] = [[[end], self.end_bias] for end in self.ends]
        if self.repetition_penalty != 1:
            options["repetition_penalty"] = self.repetition_penalty
        return options

    def answers(self, found: Found, begun: int, forced: int = 0) -> list[tuple[list[int], float]]:
        """Every returned sequence behind its first `begun` tokens, without what ends it or fills it up; its score.

        Of what was generated the first `forced` tokens are left out.
        """
        answers = []
        for row, indices in zip(found.sequences[:, begun:].tolist(), found.beam_indices.tolist(), strict=True):
            kept = row[forced : sum(index >= 0 for index in indices)]
            answers.append(kept[:-1] if kept and kept[-1] in self.ends else kept)
        return list(zip(answers, found.sequences_scores.tolist(), strict=True))

    def request(self, name: str, prefix: PrefixPayload | None, **more) -> GenerationRequest:
        params = SamplingParams(
            max_tokens=self.new,
            min_tokens=self.least,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((end, self.end_bias) for end in self.ends) if self.end_bias else (),
            stop_token_ids=frozenset(self.ends),
            ignore_eos=True,
            **more,
        )
        return GenerationRequest(name, "t", self.prompt, params, prefix)


def draw_search(draw: random.Random, **fixed) -> Search:
    new = draw.randint(1, 20)
    drawn = {
        "prompt": tuple(draw.choices(range(2, VOCABULARY - 1), k=draw.randint(1, 24))),
        "num_beams": draw.randint(2, 6),
        "new": new,
        "least": draw.choice([0, 0, draw.randint(0, new)]),
        "length_penalty": draw.choice([1.0, 1.0, 0.0, 2.0, -1.0, 0.6]),
        "early_stopping": draw.choice([False, True, "never"]),
        "repetition_penalty": draw.choice([1.0, 1.0, 1.3]),
        "end_bias": draw.choice([0.0, 2.0, 4.0]),
        "ends": draw.choice([(EOS,), (EOS, 60, 61), ()]),
        "prefix": draw.choice([0, 0, 1, 7, 20]),
        "arrives": draw.randint(0, 12),
    }
    if not drawn["ends"]:
        drawn["end_bias"], drawn["least"] = 0.0, 0
    return Search(**{**drawn, **fixed})


def drawn(seed: int, count: int = 8, **fixed) -> list[Search]:
    draw = random.Random(seed)
    return [draw_search(draw, **fixed) for _ in range(count)]


def run(engine: Engine, requests: list[GenerationRequest], arrives: list[int]) -> dict[str, list[TokenEvent]]:
    """Each request's events; integrity holds after every step."""
    pending = sorted(zip(arrives, range(len(requests)), strict=True))
    events: dict[str, list[TokenEvent]] = {made.id: [] for made in requests}
    step = 0
    while pending or engine.scheduler.running or engine.scheduler.waiting:
        while pending and pending[0][0] <= step:
            engine.scheduler.add(requests[pending.pop(0)[1]], seed=0)
        for event in engine.step():
            events[event.request_id].append(event)
        engine.scheduler.check_integrity()
        step += 1
    return events


def hypotheses(events: list[TokenEvent]) -> tuple[Hypothesis, ...]:
    (event,) = events
    assert event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), event
    return event.hypotheses


def answers(events: list[TokenEvent]) -> list[list[int]]:
    return [list(found.token_ids) for found in hypotheses(events)]
