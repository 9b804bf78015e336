"""Answers by beam search with the paper's numbers: by the serving engine for prefixes, by transformers for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import Progress

from prefix_store.model.frozen import FrozenModel
from server.engine.engine import Engine
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Limits
from tests.prove.summarise.pretrain import padded

BEAMS, LENGTH_PENALTY = 6, 0.8  # Li & Liang 2021, appendix: decoding XSUM with BART
ANSWER = 100  # tokens of an answer, its end included: as many as 99 of 100 summaries have
AT_ONCE = 10  # searches that share a step or a batch
Source = Sequence[int]


def by_engine(frozen: FrozenModel, sources: Sequence[Source], prefix: PrefixPayload | None) -> list[str]:
    """What the best beam behind each source says. The engine takes the model over."""
    limits = Limits(
        slots=32_768,
        rows=AT_ONCE * BEAMS,
        step_tokens=1024,
        context_length=frozen.context_length,
        waiting=len(sources),
    )
    engine, params = Engine(frozen, limits), SamplingParams(
        max_tokens=ANSWER, temperature=0.0, num_beams=BEAMS, length_penalty=LENGTH_PENALTY
    )  # fmt: skip
    for row, source in enumerate(sources):
        made = GenerationRequest(str(row), "", frozen.start_ids, params, prefix, source_ids=tuple(source))
        engine.scheduler.add(made, seed=row)
    best: dict[int, Sequence[int]] = {}
    with Progress(transient=True) as bar:
        shown = bar.add_task("answers", total=len(sources))
        while len(best) < len(sources):
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                best[int(event.request_id)] = event.hypotheses[0].token_ids
            bar.update(shown, completed=len(best))
    return _texts(frozen.tokenizer, [best[row] for row in range(len(sources))])


@torch.no_grad()
def by_transformers(model: Any, tokenizer: Any, sources: Sequence[Source]) -> list[str]:
    """The same by `generate`, in batches padded on the right."""
    answers = []
    for start in range(0, len(sources), AT_ONCE):
        source = padded([list(row) for row in sources[start : start + AT_ONCE]], tokenizer.pad_token_id)
        answers += model.generate(
            input_ids=source,
            attention_mask=(source != tokenizer.pad_token_id).long(),
            max_new_tokens=ANSWER,
            num_beams=BEAMS,
            length_penalty=LENGTH_PENALTY,
            do_sample=False,
        ).tolist()
    return _texts(tokenizer, answers)


def _texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
