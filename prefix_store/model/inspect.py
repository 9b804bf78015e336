"""What is in a prefix, as the frozen model sees it: words, norms, the attention it gets, what each part is good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.model import attended, nearest, stored
from prefix_store.model.attended import Shares
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.nearest import Words
from prefix_store.prefix import Method, PrefixManifest
from prefix_store.tensors import PAYLOADS, PrefixTensors

WORDS = 5
# Tokens that may be run to find what each virtual token is good for: 1 + P runs of each text's beginning.
MOST_RUN = 32_768


@dataclass(frozen=True)
class Norms:
    """Euclidean norms, over all heads: `keys` and `values` `[L, P]`; of a soft prompt also its `embeds` `[P]`.

    A memory has `memory` `[L, Hq]` and nothing else.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    embeds: torch.Tensor | None = None
    memory: torch.Tensor | None = None


@dataclass(frozen=True)
class Importance:
    """By how many nats a token of the texts is less likely without each virtual token, `[P]`; over `tokens` of them."""

    rises: torch.Tensor
    tokens: int


@dataclass(frozen=True)
class Inspection:
    """None stands for what a prefix of this method does not have, and for what needs a text where there was none."""

    norms: Norms
    words: Words | None
    shares: Shares | None
    importance: Importance | None


@torch.no_grad()
def inspect(
    frozen: FrozenModel, manifest: PrefixManifest, tensors: PrefixTensors, texts: Sequence[Sequence[int]] = ()
) -> Inspection:
    """Looks at a prefix that fits the model, which must be attached; `texts` are token ids, read one by one behind it.

    Attention to it and the importance of its virtual tokens are measured on the texts. A memory has no virtual tokens
    and no part in the softmax. Raises ModelUnsupported for an encoder-decoder model.
    """
    if frozen.is_encoder_decoder:
        raise ModelUnsupported("a prefix of an encoder-decoder model cannot be inspected yet")
    if manifest.method is Method.PREFIX_PLUS:
        memory = tensors[PAYLOADS[manifest.method]].float()
        return Inspection(Norms(memory=memory.norm(dim=(2, 3))), None, None, None)
    kv = stored.kv_of(frozen, manifest, tensors)
    embeds = tensors[PAYLOADS[manifest.method]].float() if manifest.method is Method.PROMPT else None
    keys, values = kv.transpose(2, 3).flatten(3).norm(dim=3).unbind(1)
    return Inspection(
        norms=Norms(keys, values, embeds.norm(dim=1) if embeds is not None else None),
        words=nearest.to_embeds(frozen, embeds, WORDS) if embeds is not None else nearest.to_kv(frozen, kv, WORDS),
        shares=attended.shares(frozen, stored.rows_of(frozen, manifest, tensors, kv), texts) if texts else None,
        importance=importance(frozen, manifest, kv, texts),
    )


def importance(
    frozen: FrozenModel, manifest: PrefixManifest, kv: torch.Tensor, texts: Sequence[Sequence[int]]
) -> Importance | None:
    """Leaves out each virtual token in turn. Long texts behind long prefixes are cut; None if nothing is to predict.

    Attention does not tell it: what a virtual token gets attention for may well do harm to a text.
    """
    room = max(2 * len(texts), MOST_RUN // (1 + kv.shape[3]))
    beginnings = [text[: room // len(texts)] for text in texts]
    read = [text for text in beginnings if len(text) > 1]
    if not read:
        return None
    nats = torch.stack([attended.nats_without(frozen, manifest, kv, text) for text in read]).sum(0)
    tokens = sum(len(text) - 1 for text in read)
    return Importance((nats[1:] - nats[0]) / tokens, tokens)
