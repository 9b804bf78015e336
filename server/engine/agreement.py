"""Whether what an engine answered is what plain transformers says of the same request alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from transformers import DynamicCache

from prefix_store.geometry import Stack
from prefix_store.model import apply, both
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import Memory
from prefix_store.model.rows import PrefixRows, StackRows, stacked
from prefix_store.prefix import Window
from server.engine import reference
from server.engine.self_test import INT8_TOLERANCE, TOLERANCES
from server.scheduler.messages import PrefixPayload, TokenLogprob

# A wrong prefix must make, on average, so many times the difference that is found with the right one.
APART = 4.0


@dataclass(frozen=True)
class Answer:
    """A prompt, and the greedy tokens that followed it, each with its log-probability and the likeliest others.

    An encoder-decoder model has read the `source`, and what its decoder begins with is the prompt.
    """

    prompt: tuple[int, ...]
    entries: tuple[TokenLogprob, ...]
    source: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The answer's own."""
        return [entry.token_id for entry in self.entries]


@dataclass(frozen=True)
class Difference:
    """Differences of log-probabilities; `tokens_differ` where no near tie excuses it; how many ties did."""

    logprobs: tuple[float, ...] = ()
    tokens_differ: int = 0
    near_ties: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.logprobs + other.logprobs, self.tokens_differ + other.tokens_differ, self.near_ties + other.near_ties
        )

    @property
    def largest(self) -> float:
        """Of any log-probability; infinite where one is no number."""
        return max((value if value == value else math.inf for value in self.logprobs), default=0.0)

    @property
    def mean(self) -> float:
        """Over all log-probabilities."""
        return sum(self.logprobs) / max(1, len(self.logprobs))


class Judge:
    """Plain transformers over the weights of a model that an engine has taken over, with one prefix or none."""

    def __init__(self, served: FrozenModel, prefix: PrefixPayload | None) -> None:
        self._prefix = prefix
        # what transformers has no notion of is left to the reference that training uses, still without the engine
        self.is_plain = prefix is None or (
            not served.is_encoder_decoder
            and prefix.feature_map is None
            and (prefix.slides or not served.has_sliding_window)
        )
        self._frozen = reference.plain(served) if self.is_plain else reference.attached(served)

    @torch.no_grad()
    def logits(self, answer: Answer) -> torch.Tensor:
        """`[N, V]`, float32: what each of the answer's tokens is chosen from, given those before it."""
        ids = [*answer.prompt, *answer.tokens][:-1]
        if self._frozen.is_encoder_decoder:
            logits = self._over_source(answer.source, ids)
        else:
            logits = self._plain(ids) if self.is_plain else self._by_reference(ids)
        return logits[len(answer.prompt) - 1 :].float()

    def _plain(self, ids: list[int]) -> torch.Tensor:
        """`[T, V]`: KV stands in the cache, a soft prompt in front of the embeddings."""
        model, prefix, device = self._frozen.model, self._prefix, self._frozen.device
        own = torch.tensor([ids], device=device)
        offset, length = (prefix.position_offset, prefix.virtual_tokens) if prefix else (0, 0)
        positions = torch.arange(offset, offset + len(ids), device=device)[None]
        if prefix is not None and prefix.is_embeds:
            front = prefix.tensor[None].to(device)
            embeds = torch.cat([front, model.get_input_embeddings()(own)], dim=1)
            positions = torch.cat([torch.arange(length, device=device)[None], positions], dim=1)
            logits: torch.Tensor = model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
            return logits[0, length:]
        cache = DynamicCache()  # made from the config it would drop what slides out of a window
        for layer, kv in enumerate(prefix.tensor.to(device) if prefix is not None else ()):
            cache.update(kv[0][None], kv[1][None], layer)
        mask = torch.ones(1, length + len(ids), dtype=torch.long, device=device)
        logits = model(own, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
        return logits[0]

    def _by_reference(self, ids: list[int]) -> torch.Tensor:
        prefix, device = self._prefix, self._frozen.device
        assert prefix is not None  # the bare model is plain
        own = torch.tensor([ids], device=device)
        return apply.logits(self._frozen, own, torch.ones_like(own), self._rows(prefix))[0]

    def _over_source(self, source: tuple[int, ...], ids: list[int]) -> torch.Tensor:
        """`[T, V]`: transformers has no place for keys and values ahead of the encoder's and the cross-attention's."""
        device, prefix = self._frozen.device, self._prefix
        read, own = (torch.tensor([one], device=device) for one in (source, ids))
        if prefix is None:
            found: torch.Tensor = self._frozen.model(input_ids=read, decoder_input_ids=own, use_cache=False).logits
            return found[0]
        masks = torch.ones_like(read), torch.ones_like(own)
        return both.logits(self._frozen, read, masks[0], own, masks[1], self._stacks(prefix))[0]

    def _rows(self, prefix: PrefixPayload) -> PrefixRows:
        """What stands in front of a decoder's own keys and values, and a memory beside them."""
        tensor = prefix.tensor.to(self._frozen.device)
        memory, kv = None, tensor
        if prefix.feature_map is not None:
            layers, two, heads, dim = self._frozen.geometry.kv_shape
            memory, kv = Memory(tensor, prefix.feature_map), tensor.new_zeros(layers, two, heads, 0, dim)
        elif prefix.is_embeds:
            kv = apply.prefill_embeds(self._frozen, tensor)
        window = Window.SLIDES if prefix.slides else Window.ALWAYS
        return PrefixRows.stack([kv], [prefix.position_offset], [window], [memory])

    def _stacks(self, prefix: PrefixPayload) -> StackRows:
        """The same for an encoder-decoder model, whose soft prompts stand in front of the source."""
        device = self._frozen.device
        if prefix.is_embeds:
            return StackRows.prompt(prefix.tensor.to(device), 1)
        if prefix.feature_map is not None:
            return stacked(self._rows(prefix), 1, device)
        kvs = {Stack.SELF: prefix.tensor, Stack.CROSS: prefix.cross, Stack.ENCODER: prefix.encoder}
        found = {stack: kv.to(device) for stack, kv in kvs.items() if kv is not None}
        return StackRows.shared(found, 1, prefix.position_offset)


def tolerance(frozen: FrozenModel, logits: Sequence[torch.Tensor]) -> float:
    """The self-test's, for logits of this size."""
    relative = INT8_TOLERANCE if reference.is_int8(frozen) else TOLERANCES[frozen.dtype]
    return relative * max(float(rows.abs().max()) for rows in logits)


def with_logits(answer: Answer, logits: torch.Tensor, tie: float) -> Difference:
    """An answer beside what each of its tokens is chosen from, `[N, V]`; less than `tie` between two is a near tie."""
    expected = logits.log_softmax(-1)
    apart = [
        abs(float(expected[index, token]) - logprob)
        for index, entry in enumerate(answer.entries)
        for token, logprob in _told(entry).items()
    ]
    chosen = torch.tensor(answer.tokens, device=logits.device)[:, None]
    behind = (logits.amax(1) - logits.gather(1, chosen)[:, 0]).tolist()
    # not `>= tie`: what is no number excuses nothing
    ties = sum(0 < gap < tie for gap in behind)
    return Difference(tuple(apart), sum(gap != 0 for gap in behind) - ties, ties)


def with_other(answer: Answer, other: Answer, logits: torch.Tensor, tie: float) -> Difference:
    """Two answers to one prompt, as far as they are the same; `logits` `[N, V]` are the first one's."""
    pairs = list(zip(answer.entries, other.entries, strict=True))
    same = list(takewhile(lambda pair: pair[0].token_id == pair[1].token_id, pairs))
    found = Difference(tuple(difference for pair in same for difference in _apart(*map(_told, pair))))
    if len(same) == len(pairs):
        return found
    mine, theirs = (entry.token_id for entry in pairs[len(same)])
    is_tie = abs(float(logits[len(same), mine] - logits[len(same), theirs])) < tie
    return found + Difference((), int(not is_tie), int(is_tie))


def _told(entry: TokenLogprob) -> dict[int, float]:
    """Log-probabilities by token id, the chosen token's among them."""
    return {token: value for token, value in (*entry.top, (entry.token_id, entry.logprob)) if value is not None}


def _apart(mine: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    return [abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys()]
