"""What training minimises, from the logits that predict the tokens that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefix_store.model.example import Example
from trainer.head import Objective

TINY = 1e-7  # a probability below which float32 cannot tell what is left of 1


def of(examples: Sequence[Example]) -> Objective:
    """What the examples ask for: from the logits `[c, V]` of some of their labels, and which these are, their nats.

    Against the labels themselves, or against what a teacher said of them: examples have a teacher all or none.
    """
    teachers = [example.teacher for example in examples if example.teacher is not None]
    if teachers:
        ids = torch.cat([teacher.ids for teacher in teachers])
        probabilities = torch.cat([teacher.probabilities for teacher in teachers])
        return lambda logits, places: distance(logits, ids[places], probabilities[places])
    labels = torch.tensor([example.ids[place] for example in examples for place in example.targets])
    return lambda logits, places: nats(logits, labels[places])


def nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p of `labels` `[C]` under `logits` `[C, V]`, summed, in float32."""
    return torch.nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")


def distance(logits: torch.Tensor, ids: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """-sum p log q over a teacher's likeliest tokens, `ids` `[c, 20]`, and all others as one, summed, in float32.

    p is `probabilities`, and q is `logits` `[c, V]` made probabilities. Context distillation as in Cartridges
    (Eyuboglu et al. 2025), which leaves out the others: its least is then where they have no probability at all, far
    from a teacher that is unsure. Where the likeliest tokens have all of the probability the two are the same.
    """
    ids, p = ids.to(logits.device, torch.long), probabilities.to(logits.device, torch.float32)
    logits = logits.float()
    log_q = logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)
    others = -torch.expm1(log_q.logsumexp(1))  # 1 - their sum
    p_others = (1 - p.sum(1)).clamp(min=0)
    return -(p * log_q).sum() - (p_others * others.clamp(min=TINY).log()).sum()
