"""The contestants of workload W that a user would pick instead: loaded before the clock starts, cache on, sdpa."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from prefix_store.model.frozen import measure
from tests.bench.drive import Tokens
from tests.bench.shapes import Shape
from tests.bench.workload import Item, Workload, flat_prefixes

SWITCHED = "PEFT, adapter switched per request"
GROUPED = "PEFT, grouped by adapter"
PADDED = "transformers generate, padded batch, no prefix"
CONTINUOUS = "transformers continuous batching, no prefix"
# Of continuous batching: tokens of a page of its cache and of a step. Larger ones were slower on a CPU.
PAGE, STEP_TOKENS = 16, 128


def peft_model(shape: Shape, dtype: torch.dtype, workload: Workload, device: str = "cpu") -> PeftModel:
    """PEFT's own model with all of a workload's prefixes as adapters, named by their number."""
    base = shape.model("sdpa", dtype, device=device)
    flat = flat_prefixes(workload, measure(base))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=workload.virtual_tokens)
    model = get_peft_model(base, config, adapter_name="0")
    for index, weights in enumerate(flat):
        if index:
            model.add_adapter(str(index), config)
        model.prompt_encoder[str(index)].embedding.weight.data.copy_(weights)
    return model.to(device).eval()


class PeftSwitched:
    """The adapter is switched before each request: one request at a time."""

    name = SWITCHED

    def __init__(self, model: PeftModel, workload: Workload) -> None:
        self.model = model
        self._new_tokens = workload.new_tokens

    def run(self, items: Sequence[Item]) -> Tokens:
        return [self._one(item) for item in items]

    @torch.inference_mode()
    def next_logits(self, item: Item, generated: Sequence[int] = ()) -> torch.Tensor:
        """Logits `[V]` of the token after a request's prompt and what was generated so far."""
        self.model.set_adapter(str(item.prefix))
        ids = torch.tensor([[*item.prompt, *generated]], device=self.model.device)
        logits: torch.Tensor = self.model(ids).logits[0, -1]
        return logits.float().cpu()

    def _one(self, item: Item) -> list[int]:
        self.model.set_adapter(str(item.prefix))
        return _generate(self.model, [item], self._new_tokens)[0]


class PeftGrouped:
    """All requests of an adapter in one padded batch, one adapter after another."""

    name = GROUPED

    def __init__(self, model: PeftModel, workload: Workload) -> None:
        self._model = model
        self._new_tokens = workload.new_tokens

    def run(self, items: Sequence[Item]) -> Tokens:
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            groups[item.prefix].append(index)
        tokens: Tokens = [[] for _ in items]
        for prefix, members in groups.items():
            self._model.set_adapter(str(prefix))
            found = _generate(self._model, [items[index] for index in members], self._new_tokens)
            for index, new in zip(members, found, strict=True):
                tokens[index] = new
        return tokens


class PaddedGenerate:
    """transformers' `generate` on one left-padded batch of all requests, without any prefix."""

    name = PADDED

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        self._model = model
        self._new_tokens = workload.new_tokens

    def run(self, items: Sequence[Item]) -> Tokens:
        return _generate(self._model, items, self._new_tokens)


class ContinuousBatching:
    """transformers' own continuous batching, without any prefix; its cache is made once and kept."""

    name = CONTINUOUS

    def __init__(self, model: PreTrainedModel, workload: Workload, items: Sequence[Item]) -> None:
        self._model = model
        self._new_tokens = workload.new_tokens
        # it advises against keeping the cache for another workload, and this is the same one
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        # By default it takes most of the machine's memory, and on a CPU every row looks at all of it through a mask: a
        # cache that just holds these requests is several times faster.
        pages = sum(-(-(len(item.prompt) + workload.new_tokens) // PAGE) for item in items)
        on_cpu = {"page_size": PAGE, "num_blocks": pages + 1, "max_batch_tokens": STEP_TOKENS}
        self._sizes = ContinuousBatchingConfig(**(on_cpu if model.device.type == "cpu" else {}))

    def run(self, items: Sequence[Item]) -> Tokens:
        # an end that no token can be: every request is to have all its tokens
        config = GenerationConfig(
            max_new_tokens=self._new_tokens, do_sample=False, use_cache=True, eos_token_id=-1, pad_token_id=0
        )
        replies = self._model.generate_batch(
            [list(item.prompt) for item in items],
            generation_config=config,
            continuous_batching_config=self._sizes,
            persistent_manager=True,
        )
        tokens = [list(reply.generated_tokens) for reply in replies.values()]
        if [len(new) for new in tokens] != [self._new_tokens] * len(items):
            errors = {reply.error for reply in replies.values()} - {None}
            raise RuntimeError(f"{len(tokens)} of {len(items)} requests answered, not all of them whole; {errors}")
        return tokens

    def close(self) -> None:
        """Lets go of the cache."""
        self._model.destroy_cached_continuous_batching_manager()


def why_not(arm: ContinuousBatching, item: Item) -> str | None:
    """What continuous batching says on this machine when it is asked to run; None when it runs."""
    try:
        arm.run([item])
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"
    return None


@torch.inference_mode()
def _generate(model: PreTrainedModel | PeftModel, items: Sequence[Item], new_tokens: int) -> Tokens:
    """Exactly that many greedy tokens for each row of a left-padded batch."""
    width = max(len(item.prompt) for item in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, width - len(item.prompt) :] = torch.tensor(item.prompt)
        mask[row, width - len(item.prompt) :] = 1
    options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options)
    return output[:, width:].tolist()
