"""What the training forward gives must be what the plain reference gives each example alone, forward and backward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch

from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import Memory
from prefix_store.prefix import Window
from tests.models import FAMILIES, VOCABULARY, WINDOW, random_kv, random_memory, tiny_frozen
from trainer import forward, objective, training_model
from trainer.data import Example
from trainer.forward import Group
from trainer.training_model import TrainingModel

# Observed: 8e-6 of logits up to 30, and 3e-6 of the largest of a gradient.
LOGITS, GRADIENT = 1e-5, 1e-5
FAR = 1e-2


@cache
def plain(family: str) -> FrozenModel:
    return apply.attach(tiny_frozen(family))


@cache
def ready(family: str) -> TrainingModel:
    found = training_model.attach(tiny_frozen(family))
    assert isinstance(found, TrainingModel)
    return found


@dataclass(frozen=True)
class User:
    """A prefix and its examples; what requires a gradient is in `tuned`."""

    tuned: list[torch.Tensor]
    window: Window
    examples: list[Example]
    kind: str

    def prefixes(self, count: int) -> PrefixRows | None:
        match self.kind:
            case "kv":
                (kv,) = self.tuned
                return PrefixRows.shared(kv, count, kv.shape[3], self.window)
            case "ragged":  # each row a prefix of its own, padded to the longest
                kvs = self.tuned[:count]
                return PrefixRows.stack(kvs, [kv.shape[3] for kv in kvs], [self.window] * count)
            case "memory":
                matrices, nothing = self.tuned
                return PrefixRows.stack(
                    [nothing] * count, [0] * count, [self.window] * count, [Memory(matrices, "elu")] * count
                )
        return None

    def group(self) -> Group:
        return Group(self.prefixes(len(self.examples)), self.examples)


def examples(draw: random.Random, count: int, shortest: int = 2, longest: int = 60) -> list[Example]:
    lengths = [shortest, longest, *(draw.randint(shortest, longest) for _ in range(count))][:count]
    return [
        Example(tuple(draw.randrange(2, VOCABULARY) for _ in range(length)), draw.randint(1, length - 1))
        for length in lengths
    ]


def users(frozen: FrozenModel, seed: int = 0) -> list[User]:
    """Prefixes of every length and kind, windows of both, and the bare model."""
    draw = random.Random(seed)
    kv = partial(random_kv, frozen)
    return [
        User([kv(5).requires_grad_()], Window.ALWAYS, examples(draw, 4), "kv"),
        User([], Window.ALWAYS, examples(draw, 2), "none"),
        User([kv(5, 1).requires_grad_()], Window.SLIDES, examples(draw, 3), "kv"),
        User([kv(WINDOW + 3, 2).requires_grad_()], Window.SLIDES, examples(draw, 2), "kv"),
        User([kv(n, 3 + n).requires_grad_() for n in (3, 0, 7)], Window.SLIDES, examples(draw, 3), "ragged"),
        User([random_memory(frozen).requires_grad_(), kv(0)], Window.ALWAYS, examples(draw, 2), "memory"),
    ]


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max())


def alone(frozen: FrozenModel, user: User) -> list[torch.Tensor]:
    """Each example by itself, without a row of padding, in the plain reference, which parity tests hold to PEFT."""
    found = []
    for index, example in enumerate(user.examples):
        every = user.prefixes(len(user.examples))
        row = None
        if every is not None:
            row = PrefixRows(
                every.kv[index : index + 1],
                every.valid[index : index + 1],
                every.offset[index : index + 1],
                every.slides[index : index + 1],
                every.memories[index : index + 1],
            )
        ids = torch.tensor([example.ids])
        every_place = apply.logits(frozen, ids, torch.ones_like(ids), row)[0]
        found.append(every_place[[place - 1 for place in example.targets]])
    return found


def scalar(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Depends on every logit, each in another way."""
    return torch.stack([part.logsumexp(-1).sum() + (part[:, ::7] ** 2).mean() for part in logits]).sum()


def tuned(crowd: Sequence[User]) -> list[torch.Tensor]:
    return [tensor for user in crowd for tensor in user.tuned if tensor.requires_grad and tensor.numel()]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_groups_in_one_pass_are_each_example_alone_forward_and_backward(family, record_worst):
    frozen = ready(family)
    crowd = users(frozen)
    expected = [torch.cat(alone(plain(family), user)) for user in crowd]
    found = forward.logits(frozen, [user.group() for user in crowd])
    wanted = torch.autograd.grad(scalar(expected), tuned(crowd))
    gradients = torch.autograd.grad(scalar(found), tuned(crowd))
    for user, mine, theirs in zip(crowd, found, expected, strict=True):
        assert mine.shape == (len(user.group().labels), VOCABULARY)
        assert largest(mine, theirs) < LOGITS * theirs.abs().max()
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert largest(mine, theirs) <= GRADIENT * theirs.abs().max()
    record_worst(f"{family}, training", max(map(largest, found, expected)))
    # the controls: another user's prefix, and another user's gradient, would be seen
    swapped = User(crowd[2].tuned, crowd[0].window, crowd[0].examples, "kv")
    assert largest(forward.logits(frozen, [swapped.group()])[0], expected[0]) > FAR
    assert largest(gradients[1], wanted[0]) > FAR * wanted[0].abs().max()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_one_group_is_what_it_is_among_others(family):
    crowd = users(ready(family))
    together = forward.logits(ready(family), [user.group() for user in crowd])
    for user, expected in zip(crowd, together, strict=True):
        (single,) = forward.logits(ready(family), [user.group()])
        assert largest(single, expected) < LOGITS * expected.abs().max()


def test_a_group_may_come_twice_and_rows_that_share_a_prefix_need_not_be_neighbours():
    frozen = ready("llama")
    first, _, second, *_ = users(frozen)
    few = [Group(user.prefixes(4), first.examples) for user in (first, second)]
    found = forward.logits(frozen, [few[0], few[1], few[0]])
    for mine, user in zip(found, (first, second, first), strict=True):
        expected = torch.cat(alone(plain("llama"), User(user.tuned, user.window, first.examples, "kv")))
        assert largest(mine, expected) < LOGITS * expected.abs().max()


def test_slots_left_out_in_the_midst_of_a_prefix_are_not_seen():
    frozen, kv = ready("mistral"), random_kv(plain("mistral"), 6)
    ids = tuple(range(10, 22))
    valid = torch.tensor([[True, False, True, True, False, True]])
    rows = PrefixRows(kv[None], valid, torch.tensor([6]), torch.tensor([True]), lengths=torch.tensor([6]))
    (found,) = forward.logits(frozen, [Group(rows, [Example(ids, 1)])])
    own = torch.tensor([ids])
    expected = apply.logits(plain("mistral"), own, torch.ones_like(own), rows)[0, :-1]
    assert largest(found, expected) < LOGITS * expected.abs().max()
    whole = PrefixRows.shared(kv, 1, 6, Window.SLIDES)
    assert largest(forward.logits(frozen, [Group(whole, [Example(ids, 1)])])[0], expected) > FAR


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_run_again_change_nothing(family):
    frozen = ready(family)
    assert frozen.bytes_per_token > 0
    tight = training_model.attach(tiny_frozen(family), activation_bytes=0)
    results, kept = [], []
    for model in (frozen, tight):
        crowd, saved = users(frozen), []

        def note(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = forward.logits(model, [user.group() for user in crowd])
        results.append([*found, *torch.autograd.grad(scalar(found), tuned(crowd))])
        kept.append(sum(saved))
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
    assert kept[1] < kept[0] / 2  # or nothing ran again


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_sums_are_those_of_the_logits_however_they_are_cut(family, monkeypatch):
    frozen = ready(family)
    results = []
    for rows in (None, 1, 7, 1000):
        crowd = users(frozen)
        groups = [user.group() for user in crowd]
        weights = [float(number + 1) for number in range(len(groups))]
        if rows is None:
            found = [
                objective.nats(logits, group.labels)
                for logits, group in zip(forward.logits(frozen, groups), groups, strict=True)
            ]
        else:
            monkeypatch.setattr("trainer.head.CHUNK_BYTES", 4 * VOCABULARY * rows)
            found = forward.losses(frozen, groups)
        weighted = torch.stack([weight * one for weight, one in zip(weights, found, strict=True)]).sum()
        results.append([torch.stack(found).detach(), *torch.autograd.grad(weighted, tuned(crowd))])
    for cut in results[1:]:
        for mine, theirs in zip(cut, results[0], strict=True):
            assert largest(mine, theirs) <= GRADIENT * theirs.abs().max()
    assert largest(results[0][1], results[0][2]) > FAR * results[0][1].abs().max()


def test_an_objective_is_told_which_of_its_labels_it_gets(monkeypatch):
    frozen, crowd = ready("llama"), users(ready("llama"))[:3]
    monkeypatch.setattr("trainer.head.CHUNK_BYTES", 4 * VOCABULARY * 5)
    groups = [user.group() for user in crowd]
    weights = [torch.arange(1.0, len(group.labels) + 1) for group in groups]

    def weighted(weight: torch.Tensor, logits: torch.Tensor, places: slice) -> torch.Tensor:
        return (logits.logsumexp(-1) * weight[places]).sum()

    for model in (frozen, plain("llama")):
        found = forward.sums(model, groups, [partial(weighted, weight) for weight in weights])
        whole = [
            weighted(weight, logits, slice(None))
            for weight, logits in zip(weights, forward.logits(model, groups), strict=True)
        ]
        torch.testing.assert_close(torch.stack(found), torch.stack(whole), rtol=1e-5, atol=0)


def test_without_gradients_none_is_made():
    frozen, crowd = ready("llama"), users(ready("llama"))
    with torch.no_grad():
        found = forward.losses(frozen, [user.group() for user in crowd])
    assert not any(one.requires_grad for one in found)
    (bare,) = forward.losses(frozen, [crowd[1].group()])
    assert not bare.requires_grad


def test_who_is_not_in_a_step_is_not_touched():
    frozen, crowd = ready("llama"), users(ready("llama"))
    working, idle = crowd[0], crowd[2]
    before = idle.tuned[0].detach().clone()
    optimisers = [torch.optim.AdamW(user.tuned, lr=0.1) for user in (working, idle)]
    (loss,) = forward.losses(frozen, [working.group()])
    loss.backward()
    for optimiser in optimisers:
        optimiser.step()
    assert idle.tuned[0].grad is None
    assert torch.equal(idle.tuned[0], before)
    assert working.tuned[0].grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in frozen.model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_a_model_that_is_attached_alone_takes_the_plain_way(family):
    crowd = users(plain(family))
    groups = [user.group() for user in crowd]
    for mine, theirs in zip(forward.logits(plain(family), groups), forward.logits(ready(family), groups), strict=True):
        assert largest(mine, theirs) < LOGITS * theirs.abs().max()
    plainly, packed = (torch.stack(forward.losses(model, groups)) for model in (plain(family), ready(family)))
    torch.testing.assert_close(plainly, packed, rtol=1e-5, atol=0)


def test_half_precision_is_the_reference_to_its_rounding():
    exact = users(plain("llama"))
    expected = forward.logits(plain("llama"), [user.group() for user in exact])
    frozen = tiny_frozen("llama")
    frozen.model.to(torch.bfloat16)
    half = training_model.attach(frozen)
    assert isinstance(half, TrainingModel)
    crowd = users(plain("llama"))
    found = forward.logits(half, [user.group() for user in crowd])
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype is torch.bfloat16
        assert largest(mine.float(), theirs) < 0.1 * theirs.abs().max()
    scalar([one.float() for one in found]).backward()
    assert all(tensor.grad.dtype is torch.float32 for tensor in tuned(crowd))
