from __future__ import annotations

from functools import cache

import pytest
import torch

from prefix_store.model import apply, both
from prefix_store.model.example import Example
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import Memory
from prefix_store.model.rows import PrefixRows, Rows, StackRows, stacked
from prefix_store.prefix import Window
from tests.models import BOS, ENCODER_DECODERS, FAMILIES, random_kv, random_kvs, random_memory, tiny_frozen
from trainer import training_model
from trainer.answer import answering
from trainer.slices import done

P, MOST = 3, 12
PROMPT = (BOS, *range(70, 90))  # more than any window, and several pieces


@cache
def attached(family: str) -> FrozenModel:
    return training_model.attach(tiny_frozen(family))


def answered(frozen: FrozenModel, rows: Rows | None, opening: Example) -> list[int]:
    return done(answering(frozen, rows, opening, MOST))


@torch.no_grad()
def whole(frozen: FrozenModel, rows: Rows | None, opening: Example) -> list[int]:
    """The same, but every token is found in a forward over all before it."""
    ids = list(opening.ids)
    source = torch.tensor([opening.source])
    for _ in range(MOST):
        batch = torch.tensor([ids])
        real = torch.ones_like(batch)
        if frozen.is_encoder_decoder:
            logits = both.logits(frozen, source, torch.ones_like(source), batch, real, stacked(rows, 1, frozen.device))
        else:
            assert not isinstance(rows, StackRows)
            logits = apply.logits(frozen, batch, real, rows)
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in frozen.end_ids:
            ids.pop()
            break
    return ids[len(opening.ids) :]


def prefixes(frozen: FrozenModel) -> list[Rows | None]:
    """None, keys and values that a window may or may not leave behind, and a memory."""
    kv = random_kv(frozen, P)
    kvs = [PrefixRows.shared(kv, 1, P, window) for window in Window]
    memory = Memory(random_memory(frozen), "elu")
    return [None, *kvs, PrefixRows.stack([kv[:, :, :, :0]], [0], [Window.ALWAYS], [memory])]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_read_is_kept_and_changes_no_answer(family, monkeypatch):
    monkeypatch.setattr("trainer.answer.PIECE", 5)
    frozen, opening = attached(family), Example(PROMPT, len(PROMPT))
    found = [answered(frozen, rows, opening) for rows in prefixes(frozen)]
    assert found == [whole(frozen, rows, opening) for rows in prefixes(frozen)]
    assert len({tuple(answer) for answer in found}) > 1, "else the prefixes are not seen"


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_behind_an_encoder_too(family, monkeypatch):
    monkeypatch.setattr("trainer.answer.PIECE", 2)
    frozen = attached(family)
    opening = Example((frozen.start_id, 50, 51, 52, 53), 5, source=PROMPT)
    size = frozen.geometry.hidden_size
    prompt = StackRows.prompt(torch.randn(P, size, generator=torch.Generator().manual_seed(0)), 1)
    rows: list[Rows | None] = [None, StackRows.shared(random_kvs(frozen, P), 1, P), prompt]
    found = [answered(frozen, some, opening) for some in rows]
    assert found == [whole(frozen, some, opening) for some in rows]
    assert len({tuple(answer) for answer in found}) > 1, "else the prefixes are not seen"


def test_an_answer_ends_with_its_text(monkeypatch):
    frozen = attached("llama")
    opening = Example(PROMPT, len(PROMPT))
    answer = answered(frozen, None, opening)
    end = answer[4]
    monkeypatch.setattr(FrozenModel, "end_ids", frozenset({end}))
    assert answered(frozen, None, opening) == answer[: answer.index(end)]
    slices = sum(1 for _ in answering(frozen, None, opening, MOST))
    assert slices == 1 + answer.index(end), "nothing is read behind it"
