"""What the training forward gives must be what plain transformers gives for each example alone."""

import pytest
import torch

from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.prefix import Window
from tests.models import random_kv, tiny_frozen
from trainer import forward
from trainer.data import Example
from trainer.forward import Group

EXAMPLES = [Example((0, 5, 6, 7, 8, 1), 2), Example((0, 9, 4), 2), Example((0, 3, 3, 9), 1)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_groups_do_not_see_one_another(family):
    frozen = apply.attach(tiny_frozen(family))
    prefixes = [random_kv(frozen, 4), random_kv(frozen, 2, seed=1)]
    groups = [Group(None, EXAMPLES[:1])] + [
        Group(PrefixRows.shared(kv, 2, kv.shape[3], Window.ALWAYS), EXAMPLES[start : start + 2])
        for start, kv in enumerate(prefixes)
    ]
    together = forward.logits(frozen, groups)
    for group, found in zip(groups, together, strict=True):
        assert found.shape == (len(group.labels), frozen.model.config.vocab_size)
        alone = [_plain(family, frozen, example, group.prefixes) for example in group.examples]
        torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=0)
    swapped = _plain(family, frozen, EXAMPLES[1], groups[2].prefixes)
    assert not torch.allclose(together[1][4:], swapped, atol=1e-2)


def _plain(family: str, frozen, example: Example, prefixes: PrefixRows | None) -> torch.Tensor:
    """One example alone in the plain reference, which parity tests hold to what transformers has in its cache."""
    ids = torch.tensor([example.ids])
    one = PrefixRows.shared(prefixes.kv[0], 1, int(prefixes.offset[0]), Window.ALWAYS) if prefixes is not None else None
    every = apply.logits(frozen, ids, torch.ones_like(ids), one)[0]
    return every[example.prompt_length - 1 : -1]
