"""The contestants of section `encoder_decoder` that a user would pick instead: loaded beforehand, cache on, sdpa."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prefix_store.formats import flat, peft_seq2seq
from prefix_store.geometry import Stack
from prefix_store.model import sites
from prefix_store.model.frozen import measure
from tests.bench.drive import Tokens
from tests.bench.peers import PADDED, SWITCHED
from tests.bench.shapes import Shape
from tests.bench.workload import Item, Workload

CONCATENATED = "plain concatenation, one request at a time"
ATTENTION = "bench_concatenated"

# Canonical KV `[L, 2, H, P, D]` by stack.
Stacks = Mapping[Stack, torch.Tensor]


class PeftSwitched:
    """PEFT's prefix tuning, which has the decoder's stack alone; the adapter is switched before each request."""

    name = SWITCHED

    def __init__(self, shape: Shape, workload: Workload, prefixes: Sequence[Stacks]) -> None:
        base = shape.model("sdpa")
        self._geometry, self._new_tokens = measure(base), workload.new_tokens
        self._flat = [flat.write(kvs[Stack.SELF]) for kvs in prefixes]
        config = PrefixTuningConfig(task_type=peft_seq2seq.TASK_TYPE, num_virtual_tokens=workload.virtual_tokens)
        self._model = get_peft_model(base, config, adapter_name="0")
        for index, weights in enumerate(self._flat):
            if index:
                self._model.add_adapter(str(index), config)
            self._model.prompt_encoder[str(index)].embedding.weight.data.copy_(weights)
        self._model.eval()

    def read(self) -> list[torch.Tensor]:
        """What PEFT makes of each adapter: layers share what it deals out, see `peft_seq2seq`."""
        return [peft_seq2seq.read({}, weights, self._geometry)[1][flat.KV] for weights in self._flat]

    def run(self, items: Sequence[Item]) -> Tokens:
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> list[int]:
        self._model.set_adapter(str(item.prefix))
        return _generate(self._model, [item], self._new_tokens)[0]


class PaddedGenerate:
    """transformers' `generate` on one batch of all requests, without any prefix."""

    name = PADDED

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        self._model, self._new_tokens = model, workload.new_tokens

    def run(self, items: Sequence[Item]) -> Tokens:
        return _generate(self._model, items, self._new_tokens)


class Concatenated:
    """The plain model with a prefix's keys and values put in front of its own, in the stacks that the prefix has.

    In the decoder they are the beginning of transformers' caches, in the encoder they are joined before sdpa. The loop
    is the shortest there can be.
    """

    name = CONCATENATED

    def __init__(self, model: PreTrainedModel, workload: Workload, prefixes: Sequence[Stacks] | None) -> None:
        self._model: Any = model
        self._new_tokens, self._prefixes = workload.new_tokens, prefixes
        self._start = int(model.config.decoder_start_token_id)
        sites.mark(model)
        self._attend_behind(None)
        model.set_attn_implementation(ATTENTION)

    @torch.inference_mode()
    def run(self, items: Sequence[Item]) -> Tokens:
        return [self._one(item) for item in items]

    @torch.inference_mode()
    def next_logits(self, item: Item, generated: Sequence[int] = ()) -> torch.Tensor:
        """Logits `[V]` of the token after what was generated so far."""
        states, cache = self._begin(item)
        for token in (self._start, *generated):
            logits = self._step(states, cache, token)
        return logits

    def _one(self, item: Item) -> list[int]:
        states, cache = self._begin(item)
        tokens = [self._start]
        for _ in range(self._new_tokens):
            tokens.append(int(self._step(states, cache, tokens[-1]).argmax()))
        return tokens[1:]

    def _begin(self, item: Item) -> tuple[Any, EncoderDecoderCache]:
        """The encoder's output, and caches that begin with the prefix's keys and values."""
        kvs = self._prefixes[item.prefix] if self._prefixes is not None else {}
        self._attend_behind(kvs.get(Stack.ENCODER))
        states = self._model.get_encoder()(input_ids=torch.tensor([item.prompt]))
        own, cross = DynamicCache(), DynamicCache()
        for cache, stack in ((own, Stack.SELF), (cross, Stack.CROSS)):
            for layer, kv in enumerate(kvs.get(stack, ())):
                cache.update(kv[0][None], kv[1][None], layer)
        caches = EncoderDecoderCache(own, cross)
        # the source's keys and values are still to come behind the prefix's
        caches.is_updated = dict.fromkeys(caches.is_updated, False)
        return states, caches

    def _attend_behind(self, kv: torch.Tensor | None) -> None:
        AttentionInterface.register(ATTENTION, partial(_joined, kv=kv))

    def _step(self, states: Any, cache: EncoderDecoderCache, token: int) -> torch.Tensor:
        output = self._model(
            encoder_outputs=states,
            decoder_input_ids=torch.tensor([[token]]),
            past_key_values=cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits


def _joined(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    kv: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """sdpa; in the encoder over `kv` `[L, 2, H, P, D]`, too."""
    site = sites.of(module)
    if kv is not None and site.stack is Stack.ENCODER:
        key, value = (torch.cat([part[None], own], 2) for part, own in zip(kv[site.layer], (key, value), strict=True))
    return sdpa_attention_forward(module, query, key, value, mask, **options)


@torch.inference_mode()
def _generate(model: Any, items: Sequence[Item], new_tokens: int) -> Tokens:
    """Exactly that many greedy tokens for each row of a right-padded batch."""
    width = max(len(item.prompt) for item in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, : len(item.prompt)] = torch.tensor(item.prompt)
        mask[row, : len(item.prompt)] = 1
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0
    )
    return output[:, 1:].tolist()
