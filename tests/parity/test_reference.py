"""What training runs and what serving runs are the same function: the reference and the engine agree to rounding."""

from __future__ import annotations

import pytest
import torch

from prefix_store.model import apply
from prefix_store.prefix import Window
from tests.models import FAMILIES, random_kv, tiny_frozen
from tests.parity.harness import TOLERANCE, Case, make_engine, payload, recorded, run_mixed, sampled

# short enough for the tiny models' windows to show some of the prefix
PROMPT = tuple(range(40, 46))


@pytest.mark.parametrize("window", Window)
@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_the_engine_equals_the_reference_that_training_uses(family, window, record_worst):
    reference = apply.attach(tiny_frozen(family))
    kvs = [random_kv(reference, length, seed=length) for length in (3, 14)]
    rows = apply.PrefixRows.stack(kvs, [3, 14], [window, window])
    ids = torch.tensor([PROMPT, PROMPT])
    expected = apply.logits(reference, ids, torch.ones_like(ids), rows)[:, -1].detach()

    engine = make_engine(tiny_frozen(family), step_tokens=5)
    slides = window is Window.SLIDES
    prefixes = [payload(kv, f"{index}", slides=slides) for index, kv in enumerate(kvs)]
    run_mixed(engine, [Case(PROMPT, kv, new=1) for kv in kvs], prefixes)
    got = torch.cat([recorded(engine, "0"), recorded(engine, "1")])
    worst = float((got - expected).abs().max())
    record_worst(f"{family}, reference", worst)
    assert worst < TOLERANCE
    assert float((got.flip(0) - expected).abs().max()) > 100 * TOLERANCE
