"""Plain rows are sampled without waiting for the device; what has no numbers at all stands in for one that is busy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefix_store.errors import PrefixNumerics
from server.engine import filters, sampler, transit
from server.engine.batch import Selection
from server.engine.sampler import sample
from server.scheduler.messages import GenerationRequest
from server.scheduler.plan import Row
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence

VOCABULARY = 600
PLAIN = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "seed": 3},
    {"top_k": 5},
    {"top_p": 0.9},
    {"top_k": 599, "top_p": 0.5},
    {"min_p": 0.2},
    {"temperature": 0.0, "ignore_eos": True, "stop_token_ids": frozenset({1})},
]
OTHERS = [
    {"logprobs": 0},
    {"temperature": 0.0, "repetition_penalty": 1.1},
    {"logit_bias": ((3, 1.0),)},
    {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": frozenset({1})},
]


def selections(*params: dict) -> list[Selection]:
    """A row of one token for each, which samples."""
    requests = [GenerationRequest(str(i), "t", (i,), SamplingParams(**one)) for i, one in enumerate(params)]
    return [Selection(Row(Sequence(request, seed=i), 0, 1), i, 1) for i, request in enumerate(requests)]


def test_the_host_waits_for_no_plain_row():
    found = sample(torch.empty(len(PLAIN), VOCABULARY, device="meta"), selections(*PLAIN))
    assert found.unread.tokens.shape == (len(PLAIN),)


@pytest.mark.parametrize("other", OTHERS)
def test_it_would_be_seen_if_it_did(other):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        sample(torch.empty(2, VOCABULARY, device="meta"), selections(PLAIN[0], other))


class Copies(TorchDispatchMode):
    """Notes what is copied to a device by something else than `bring`, which would wait for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self._is_brought = False
        for module in (sampler, filters):
            monkeypatch.setattr(module, "bring", self.bring)

    def bring(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self._is_brought = True
        brought = transit.bring(tensor, device)
        self._is_brought = False
        return brought

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        is_moved = isinstance(found, torch.Tensor) and any(tensor.device != found.device for tensor in tensors)
        if is_moved and not self._is_brought:
            self.waiting.append(func.name())
        return found


@pytest.mark.parametrize("is_waiting", [False, True])
def test_what_plain_rows_ask_for_is_brought_without_waiting(monkeypatch, is_waiting):
    copies = Copies(monkeypatch)
    if is_waiting:
        monkeypatch.setattr(sampler, "bring", lambda tensor, device: tensor.to(device))
    with copies:
        sample(torch.empty(len(PLAIN), VOCABULARY, device="meta"), selections(*PLAIN))
    assert bool(copies.waiting) == is_waiting


@pytest.mark.parametrize("params", PLAIN)
def test_a_row_that_is_no_number_gives_a_token_that_the_model_knows_and_an_error(params):
    logits = torch.full((2, VOCABULARY), torch.nan)
    logits[1] = torch.linspace(0, 9, VOCABULARY)
    found = sample(logits, selections(params, {"temperature": 0.0}))
    broken, sound = found.read()
    assert 0 <= int(found.unread.tokens[0]) < VOCABULARY
    assert isinstance(broken.error, PrefixNumerics)
    assert (sound.token_id, int(found.unread.tokens[1])) == (VOCABULARY - 1, VOCABULARY - 1)


def test_a_row_that_does_not_sample_yet_keeps_nobody_waiting():
    request = GenerationRequest("long", "t", (1, 2, 3), SamplingParams(repetition_penalty=2.0))
    part = Selection(Row(Sequence(request, seed=0), 0, 2), 1, 0)
    first, second = sample(torch.eye(1, 5), [*selections({"temperature": 0.0}), part]).read()
    assert (first.token_id, second.token_id, second.error) == (0, None, None)
