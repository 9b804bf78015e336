from __future__ import annotations

import pytest
import torch

from prefix_store.errors import ContextLengthExceeded, InvalidRequest
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel
from tests.models import BOS, CONTEXT, EOS, tiny_frozen
from trainer import forward
from trainer.data import Example
from trainer.forward import Group
from trainer.loop import fit
from trainer.methods.prefix import DirectKV
from trainer.slices import done
from trainer.teacher import TOP, teaching

FAMILIES = ["gpt2", "llama", "mistral"]  # with a window that leaves most of the context behind
TEXT = "The cat of Ann is called Mo. The dog of Ben is called Rex."
EXAMPLES = [Example((BOS, 5, 6, 7, 8, EOS), 3), Example((BOS, 9, 4), 1), Example((33, 34, 35, 36), 2)]


def attached(family: str, *, bos: bool = True) -> FrozenModel:
    return apply.attach(tiny_frozen(family, bos=bos))


def taught(frozen: FrozenModel, context: str, examples: list[Example], size: int) -> list[Example]:
    return done(teaching(frozen, context, examples, size))


@torch.no_grad()
def said(family: str, context: list[int], example: Example) -> torch.Tensor:
    """By plain transformers, the text in front: `[C, V]` log-probabilities at the example's targets."""
    own = list(example.ids[1:] if example.ids[0] == BOS else example.ids)
    row = context + own
    logits = tiny_frozen(family).model(torch.tensor([row])).logits[0].log_softmax(1)
    return torch.stack([logits[place + len(row) - len(example.ids) - 1] for place in example.targets])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bos", [True, False])
def test_the_teacher_is_the_model_with_the_text_in_its_context(family, bos):
    frozen = attached(family, bos=bos)
    context = frozen.tokenizer(TEXT).input_ids
    assert (context[0] == BOS) == bos
    for example, found in zip(EXAMPLES, taught(frozen, TEXT, EXAMPLES, 2), strict=True):
        expected = said(family, context, example)
        assert found.teacher is not None
        assert found.teacher.ids.shape == (len(example.targets), TOP)
        best = expected.topk(TOP)
        p = expected.exp().gather(1, found.teacher.ids.long())
        torch.testing.assert_close(found.teacher.probabilities.float(), p, atol=1e-5, rtol=2e-3)
        torch.testing.assert_close(p, best.values.exp(), atol=1e-5, rtol=1e-4)
        without = said(family, context[:1], example).exp().gather(1, found.teacher.ids.long())
        assert (without - p).abs().max() > 0.01


def test_what_is_kept_is_compact_and_the_examples_stay_the_same():
    found = taught(attached("llama"), TEXT, EXAMPLES, 2)
    assert found == EXAMPLES
    for example in found:
        size = example.teacher.ids.nbytes + example.teacher.probabilities.nbytes
        assert size == 120 * len(example.targets)


@pytest.mark.parametrize("size", [1, 3])
def test_an_example_does_not_depend_on_its_neighbours(size):
    frozen = attached("llama")
    for one, other in zip(taught(frozen, TEXT, EXAMPLES, size), taught(frozen, TEXT, EXAMPLES, 2), strict=True):
        torch.testing.assert_close(one.teacher.probabilities, other.teacher.probabilities, atol=1e-5, rtol=1e-3)


def test_others_have_their_turn_after_every_batch():
    for size, batches in ((1, 3), (2, 2), (3, 1)):
        assert len(list(teaching(attached("llama"), TEXT, EXAMPLES, size))) == batches


def test_a_context_that_does_not_fit_is_refused():
    frozen = attached("llama")
    with pytest.raises(ContextLengthExceeded, match=f"has 507 tokens and the longest example 6, .* {CONTEXT}"):
        taught(frozen, "a" * (CONTEXT - 6), EXAMPLES, 2)
    assert taught(frozen, "a" * (CONTEXT - 7), EXAMPLES[:1], 2)


@pytest.mark.parametrize("bos", [True, False])
def test_a_context_of_nothing_is_refused(bos):
    with pytest.raises(InvalidRequest, match="at least two tokens"):
        taught(attached("llama", bos=bos), "" if bos else "a", EXAMPLES, 2)


@torch.no_grad()
def kl(method: DirectKV | None, examples: list[Example]) -> float:
    """Mean nats by which a student's predictions differ from those of the model with the text in its context."""
    frozen = attached("llama")
    rows = method.rows(1) if method is not None else None
    differences = []
    for example in examples:
        (student,) = forward.logits(frozen, [Group(rows, [example])])
        truth = said("llama", frozen.tokenizer(TEXT).input_ids, example)
        differences.append((truth.exp() * (truth - student.log_softmax(1))).sum(1))
    return float(torch.cat(differences).mean())


def test_a_distilled_prefix_answers_like_the_model_with_the_text_in_its_context():
    frozen, draw = attached("llama"), torch.Generator().manual_seed(0)
    examples = [Example((BOS, *torch.randint(2, 258, (14,), generator=draw).tolist()), 3) for _ in range(40)]
    learnt, unseen = examples[:32], examples[32:]
    spec = TrainingSpec("0" * 64, 32, virtual_tokens=16, steps=40, batch_size=8, learning_rate=0.3)
    told, found = taught(frozen, TEXT, learnt, 8), {}
    for name, shown in (("distil", told), ("lm", learnt)):
        method = DirectKV(frozen, spec, frozen.tokenizer(TEXT).input_ids)
        found["start"] = kl(method, unseen)
        fit(frozen, method, shown, spec)
        found[name] = kl(method, unseen)
    assert found["distil"] < 0.5 * found["start"]  # observed 0.11, 0.38
    assert found["distil"] < 0.2 * kl(None, unseen)  # observed 0.85
    assert found["lm"] > 2 * found["start"], "the examples themselves tell nothing of it"
