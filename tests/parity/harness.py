"""Runs requests through the engine while recording every logit, and the same requests alone through transformers."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from _pytest.mark import ParameterSet
from transformers import DynamicCache, PreTrainedModel

from prefix_store.model.frozen import FrozenModel
from server.engine.attention import native
from server.engine.batch import Batch
from server.engine.engine import Engine
from server.engine.kv_pool import memory_slots
from server.engine.model_runner import ModelRunner
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload, TokenEvent
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Limits

# About 1e-5 is what float32 sums in another order give; a wrong position or neighbour is off by whole units.
TOLERANCE = 5e-5


# The families that the fast tests run; all the others are slow.
SAMPLE = ("gpt2", "llama")
# Those of tests that take seconds of each, unless `ANTEFIX_EVERY_FAMILY=1` asks for every one.
FEW = (*SAMPLE, "opt", "gemma3_text", "bart", "t5")


def sampled(families: Iterable[str]) -> list[ParameterSet]:
    """Every family, as parameters of a test."""
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in families]


def a_few(families: Iterable[str]) -> list[str]:
    """Those of the families that a test has time for, where it takes seconds of each."""
    return [name for name in families if name in FEW or "ANTEFIX_EVERY_FAMILY" in os.environ]


def backends() -> list[ParameterSet | str]:
    """Every attention backend of a CPU, as parameters of a test."""
    missing = pytest.mark.skipif(not native.is_available(torch.float32), reason="no C compiler")
    return [pytest.param("native", marks=missing), "cpu", "plain"]


@dataclass(frozen=True)
class Case:
    """A greedy request and the step at which it arrives; an encoder-decoder model's has a `source`."""

    prompt: tuple[int, ...]
    kv: torch.Tensor | None
    new: int
    arrives: int = 0
    name: str = ""
    source: tuple[int, ...] = ()


class Recorder:
    """A model runner that keeps the logits each token is chosen from; the engine around it is the real one."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.windows, self.lists, self.prefill = runner.windows, runner.lists, runner.prefill
        self.recorded: dict[str, list[torch.Tensor]] = defaultdict(list)

    def run(self, batch: Batch) -> torch.Tensor:
        logits = self._runner.run(batch)
        for selection in batch.selections:
            if selection.row.samples:
                last = selection.first + selection.count - 1
                self.recorded[selection.row.sequence.request.id].append(logits[last].float().cpu().clone())
        return logits


def make_engine(frozen: FrozenModel, backend: str | None = None, **limits: int) -> Engine:
    """An engine over a copy of the model, for an engine takes over what it is given.

    Its clock stands still: chunks of prompt follow what steps cost, and products of other sizes round otherwise.
    """
    numbers = {"slots": 4096, "rows": 16, "step_tokens": 64, "context_length": 512, "waiting": 1000} | limits
    copied = replace(frozen, model=copy.deepcopy(frozen.model))
    engine = Engine(copied, Limits(**numbers), backend=backend, clock=lambda: 0.0)
    engine.runner = Recorder(engine.runner)  # type: ignore[assignment]
    return engine


def recorded(engine: Engine, name: str) -> torch.Tensor:
    """The logits `[new, V]` of a request's tokens."""
    return torch.stack(engine.runner.recorded[name])


def payload(kv: torch.Tensor, digest: str, *, slides: bool = True, offset: int | None = None) -> PrefixPayload:
    length = kv.shape[3]
    return PrefixPayload(digest, length, length if offset is None else offset, slides, kv)


def memory_payload(model: FrozenModel, memory: torch.Tensor, digest: str, feature_map: str = "elu") -> PrefixPayload:
    slots = memory_slots(model.geometry)
    return PrefixPayload(digest, 0, 0, True, memory, feature_map=feature_map, memory_slots=slots)


def request(name: str, case: Case, prefix: PrefixPayload | None) -> GenerationRequest:
    params = SamplingParams(max_tokens=case.new, temperature=0.0, ignore_eos=True)
    return GenerationRequest(name, "default", case.prompt, params, prefix, source_ids=case.source)


def run_mixed(engine: Engine, cases: Sequence[Case], prefixes: Sequence[PrefixPayload | None]) -> dict[str, list[int]]:
    """Feeds each case at its step, checks integrity after every step, and returns tokens by case number."""
    pending = sorted(enumerate(cases), key=lambda pair: pair[1].arrives)
    tokens: dict[str, list[int]] = defaultdict(list)
    unfinished = len(cases)
    for step in range(100_000):
        while pending and pending[0][1].arrives <= step:
            index, case = pending.pop(0)
            engine.scheduler.add(request(str(index), case, prefixes[index]), seed=index)
        events: list[TokenEvent] = engine.step()
        engine.scheduler.check_integrity()
        for event in events:
            assert event.finish_reason in (None, FinishReason.LENGTH), event
            tokens[event.request_id].extend(event.token_ids)
            unfinished -= event.finish_reason is not None
        if not unfinished and not pending:
            return tokens
    raise AssertionError("the engine does not finish")


def alone(model: PreTrainedModel, case: Case) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits `[new, V]`, recomputed whole for every token, from a seeded cache."""
    ids, rows = list(case.prompt), []
    for _ in range(case.new):
        rows.append(plain_logits(model, ids, case.kv)[-1])
        ids.append(int(rows[-1].argmax()))
    return ids[len(case.prompt) :], torch.stack(rows)


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: Sequence[int], kv: torch.Tensor | None) -> torch.Tensor:
    """Logits `[T, V]` of one row by unmodified transformers, the prefix as a cache of past keys and values."""
    cache, length, device = DynamicCache(), 0, model.device
    if kv is not None:
        length = kv.shape[3]
        for layer in range(kv.shape[0]):
            keys, values = kv[layer][:, None].to(device, copy=True)
            cache.update(keys, values, layer)
    positions = torch.arange(length, length + len(ids), device=device)[None]
    mask = torch.ones(1, length + len(ids), dtype=torch.long, device=device)
    tokens = torch.tensor([list(ids)], device=device)
    output = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return output.logits[0]


def worst_difference(engine: Engine, references: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference of any logit of any case; infinite where one is no number."""
    differences = [(recorded(engine, str(i)) - reference).abs().max() for i, reference in enumerate(references)]
    return float(torch.stack(differences).nan_to_num(torch.inf, posinf=torch.inf).max())
