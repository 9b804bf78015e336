"""The frozen model, bound to packed steps over the KV pool."""

from __future__ import annotations

from typing import Any

import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import Stack
from prefix_store.model import activation
from prefix_store.model.frozen import FrozenModel
from server.engine import attention, fused, gated, linear, siblings
from server.engine.attention import StackStep, StepContext
from server.engine.attention.work import prefill_item
from server.engine.batch import Batch
from server.engine.kv_pool import KVPool
from server.engine.step_graphs import Recorder, StepGraphs
from server.scheduler.limits import Limits
from server.scheduler.slots import Extent


class ModelRunner:
    """Runs the unmodified `forward` of a transformers model on packed tokens, with attention over the pool."""

    def __init__(self, frozen: FrozenModel, pool: KVPool, backend: str, *, int8: bool = False) -> None:
        self.frozen = frozen
        self.int8 = int8
        self.pool = pool
        self.backend = backend
        self.lists = attention.lists_device(backend, frozen.device)
        self.windows = _windows(frozen.model)
        self._graphs: StepGraphs | None = None
        bind(frozen.model)
        (linear.quantize if int8 else linear.pack)(frozen.model)
        for kind in (activation, gated, siblings, fused):
            kind.fuse(frozen.model)

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits `[N, V]` of the selected positions of a batch that lies on the host, to be read before the next run.

        The keys and values of its tokens go into the pool.
        """
        logits = self._graphs.run(batch) if self._graphs is not None else None
        return logits if logits is not None else self.forward(batch.on(self.frozen.device, self.lists))

    def record(self, record: Recorder, limits: Limits) -> None:
        """Has the steps that these limits allow recorded, and plays them from now on; see `StepGraphs`."""
        self._graphs = StepGraphs(
            self.forward,
            record,
            windows=self.windows,
            spare_slot=self.pool.slots,
            device=self.frozen.device,
            most_tokens=limits.step_tokens,
            most_rows=limits.rows,
        )

    def compile(self, backend: str = "inductor") -> None:
        """Has torch compile the model at its next step, as one graph that serves steps of all sizes but a single token.

        Attention stays one operator. A model that is more than one graph raises what torch raises.
        """
        model: Any = self.frozen.model
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend=backend)

    def run_eagerly(self) -> None:
        """Undoes `record` and `compile`."""
        self._graphs = None
        vars(self.frozen.model).pop("forward", None)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """As `run`, of a batch that lies on the device."""
        own = StackStep(*self.pool.of(Stack.SELF), batch.slots, batch.work, batch.memories)
        output = self.frozen.model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=batch.selected,
            antefix=StepContext({Stack.SELF: own}, self.backend),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def prefill(self, embeds: torch.Tensor, extent: Extent) -> None:
        """Makes a soft prompt `[P, E]` the keys and values of its extent, as if P tokens stood at positions 0 to P - 1.

        Prompt tuning (Lester et al. 2021) puts the prompt before every input; the model is causal, so what its own
        positions hold does not depend on what follows and is computed once for all rows.
        """
        count, device = len(embeds), self.frozen.device
        slots = torch.arange(extent.start, extent.end, device=device)
        items = {window: prefill_item(extent, window) for window in self.windows}
        work = {window: torch.tensor([item.as_tuple()], device=self.lists) for window, item in items.items()}
        own = StackStep(*self.pool.of(Stack.SELF), slots, work)
        self.frozen.model(
            inputs_embeds=embeds[None].to(device),
            position_ids=torch.arange(count, device=device)[None],
            use_cache=False,
            logits_to_keep=1,
            antefix=StepContext({Stack.SELF: own}, self.backend),
        )


def bind(model: torch.nn.Module, name: str = attention.NAME) -> None:
    """Makes every attention of the model call the function of that name, by default `antefix`.

    Some versions of transformers set the top config only, so each module's own config is set and then checked.
    """
    model.set_attn_implementation(name)  # type: ignore[operator]
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", name) != name:
            config._attn_implementation = name
            if config._attn_implementation != name:
                raise ModelUnsupported(f"{type(model).__name__} does not let its attention be replaced")


def _windows(model: torch.nn.Module) -> frozenset[int]:
    """Every sliding window a layer may pass to its attention; 0 for none."""
    config: Any = model.config
    return frozenset({0, getattr(config.get_text_config(), "sliding_window", None) or 0})
