"""The contestants of workload W, each at its best: loaded before the clock starts, key-value cache on, sdpa."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import PreTrainedModel

from prefix_store.model.frozen import freeze
from server.engine.engine import Engine
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Limits
from tests.bench.workload import GPT2_SMALL, NEW_TOKENS, VIRTUAL_TOKENS, Item, flat_prefixes, gpt2_small

Tokens = list[list[int]]


class Arm(Protocol):
    """Generates for a list of requests; `run` is what gets timed."""

    name: str

    def run(self, items: Sequence[Item]) -> Tokens:
        """New tokens of every request, in order."""


class Antefix:
    """This engine, all requests submitted at once; `prefixed` False serves the bare model."""

    def __init__(self, *, prefixed: bool = True) -> None:
        self.name = "antefix, mixed prefixes" if prefixed else "antefix, no prefix"
        self._prefixed = prefixed
        frozen = freeze(gpt2_small("eager"), None, digest="bench", name="gpt2-small-shape")
        limits = Limits(slots=32_768, rows=64, step_tokens=512, context_length=1024, waiting=1024)
        self._engine = Engine(frozen, limits)
        heads, size = GPT2_SMALL["n_head"], GPT2_SMALL["n_embd"] // GPT2_SMALL["n_head"]
        flat = flat_prefixes().view(-1, VIRTUAL_TOKENS, GPT2_SMALL["n_layer"], 2, heads, size)
        self._payloads = [
            PrefixPayload(f"{i}", VIRTUAL_TOKENS, VIRTUAL_TOKENS, True, kv.permute(1, 2, 3, 0, 4).contiguous())
            for i, kv in enumerate(flat)
        ]

    def run(self, items: Sequence[Item]) -> Tokens:
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        for index, item in enumerate(items):
            payload = self._payloads[item.prefix] if self._prefixed else None
            self._engine.scheduler.add(GenerationRequest(str(index), "", item.prompt, params, payload), seed=0)
        tokens: Tokens = [[] for _ in items]
        while self._engine.scheduler.running or self._engine.scheduler.waiting:
            for event in self._engine.step():
                tokens[int(event.request_id)].extend(event.token_ids)
        return tokens


class PeftSwitched:
    """PEFT's own model with all adapters loaded, switched before each request: one request at a time."""

    name = "PEFT, adapter switched per request"

    def __init__(self) -> None:
        flat = flat_prefixes()
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
        self.model = get_peft_model(gpt2_small("sdpa"), config, adapter_name="0")
        for index in range(len(flat)):
            if index:
                self.model.add_adapter(str(index), config)
            self.model.prompt_encoder[str(index)].embedding.weight.data.copy_(flat[index])
        self.model.eval()

    def run(self, items: Sequence[Item]) -> Tokens:
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> list[int]:
        self.model.set_adapter(str(item.prefix))
        ids = torch.tensor([item.prompt])
        return generate(self.model, ids, torch.ones_like(ids))[0]


class PaddedGenerate:
    """transformers' `generate` on one left-padded batch of all requests, without any prefix."""

    name = "transformers generate, padded batch, no prefix"

    def __init__(self) -> None:
        self._model = gpt2_small("sdpa")

    def run(self, items: Sequence[Item]) -> Tokens:
        width = max(len(item.prompt) for item in items)
        ids = torch.zeros(len(items), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(items):
            ids[row, width - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[row, width - len(item.prompt) :] = 1
        return generate(self._model, ids, mask)


@torch.inference_mode()
def next_logits(peft: PeftSwitched, item: Item, generated: list[int]) -> torch.Tensor:
    """PEFT's logits `[V]` of the token after a request's prompt and what was generated so far."""
    peft.model.set_adapter(str(item.prefix))
    logits: torch.Tensor = peft.model(torch.tensor([[*item.prompt, *generated]])).logits[0, -1]
    return logits


@torch.inference_mode()
def generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> Tokens:
    """Exactly NEW_TOKENS greedy tokens for each row."""
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0
    )
    return output[:, ids.shape[1] :].tolist()
