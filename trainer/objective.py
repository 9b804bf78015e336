"""What training minimises, from the logits that predict the tokens that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefix_store.model.example import TopTokens
from trainer.forward import Group

TINY = 1e-7  # a probability below which float32 cannot tell what is left of 1


def loss(logits: torch.Tensor, group: Group) -> torch.Tensor:
    """Nats per token that counts, from the logits `[C, V]` of a group: against its labels, or what its teacher said.

    Examples have a teacher all or none.
    """
    teachers = [example.teacher for example in group.examples if example.teacher is not None]
    whole = distance(logits, teachers) if teachers else nats(logits, group.labels)
    return whole / len(logits)


def nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p of `labels` `[C]` under `logits` `[C, V]`, summed, in float32."""
    return torch.nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")


def distance(logits: torch.Tensor, teachers: Sequence[TopTokens]) -> torch.Tensor:
    """-sum p log q over each teacher's likeliest tokens and all others as one, summed, in float32.

    q is `logits` `[C, V]` made probabilities. Context distillation as in Cartridges (Eyuboglu et al. 2025), which
    leaves out the others: its least is then where they have no probability at all, far from a teacher that is unsure.
    Where the teacher's likeliest tokens have all of the probability the two are the same.
    """
    ids = torch.cat([teacher.ids for teacher in teachers]).to(logits.device, torch.long)
    p = torch.cat([teacher.probabilities for teacher in teachers]).to(logits.device, torch.float32)
    logits = logits.float()
    log_q = logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)
    others = -torch.expm1(log_q.logsumexp(1))  # 1 - their sum
    p_others = (1 - p.sum(1)).clamp(min=0)
    return -(p * log_q).sum() - (p_others * others.clamp(min=TINY).log()).sum()
