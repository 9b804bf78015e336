"""What the faster dtypes cost: a row still does not depend on its neighbours, and the model is as good as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from prefix_store.model import frozen
from prefix_store.model.frozen import FrozenModel
from server.engine import int8_linear, linear
from server.engine.engine import Engine
from server.scheduler.scheduler import Limits
from tests.models import FAMILIES, tiny_frozen, tiny_model
from tests.parity.harness import Recorder, payload, recorded, run_mixed, sampled
from tests.parity.test_families import make_cases

# Bits per byte may be this much more than float32's. Seen: 0.03 % less in bfloat16, 0.02 % more in int8.
WORSE = 0.01
TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what
is the use of a book," thought Alice, "without pictures or conversation?" So she was considering in her own mind, as
well as she could, for the hot day made her feel very sleepy and stupid, whether the pleasure of making a daisy-
chain would be worth the trouble of getting up and picking the daisies, when suddenly a white rabbit with pink eyes
ran close by her. There was nothing so very remarkable in that; nor did Alice think it so very much out of the way
to hear the rabbit say to itself, "Oh dear! Oh dear! I shall be late!" But when the rabbit actually took a watch out
of its waistcoat pocket, and looked at it, and then hurried on, Alice started to her feet, for it flashed across her
mind that she had never before seen a rabbit with either a waistcoat pocket, or a watch to take out of it, and
burning with curiosity, she ran across the field after it, and fortunately was just in time to see it pop down a
large hole under the hedge."""


def make(family: str, *, int8: bool) -> Engine:
    model = tiny_model(family).to(torch.bfloat16)
    served = replace(tiny_frozen(family), model=model)
    engine = Engine(served, Limits(4096, rows=16, step_tokens=512, context_length=512, waiting=100), int8=int8)
    engine.runner = Recorder(engine.runner)  # type: ignore[assignment]
    return engine


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_a_row_has_the_logits_it_has_alone(family, int8):
    if int8 and not int8_linear.works():
        pytest.skip("no exact int8 product on this machine")
    cases = [replace(case, arrives=0) for case in make_cases(tiny_frozen(family))]
    mixed, single = make(family, int8=int8), make(family, int8=int8)
    prefixes = [None if c.kv is None else payload(c.kv.bfloat16(), f"length {c.kv.shape[3]}") for c in cases]
    tokens = run_mixed(mixed, cases, prefixes)
    worst = 0.0
    for index, (case, prefix) in enumerate(zip(cases, prefixes, strict=True)):
        single.runner.recorded.clear()
        assert run_mixed(single, [case], [prefix])["0"] == tokens[str(index)]
        worst = max(worst, float((recorded(mixed, str(index)) - recorded(single, "0")).abs().max()))
    assert worst < 1e-6  # 0.0 was seen


def bits_per_byte(served: FrozenModel) -> float:
    ids = torch.tensor([[served.tokenizer.bos_token_id, *served.tokenizer(TEXT, add_special_tokens=False).input_ids]])
    with torch.inference_mode():
        logits = served.model(ids[:, :-1]).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")) / math.log(2) / len(TEXT)


def test_the_bundled_model_reads_as_well(monkeypatch):
    exact = bits_per_byte(frozen.load(frozen.BUNDLED))
    half = frozen.load(frozen.BUNDLED, dtype="bfloat16")
    linear.pack(half.model)
    assert abs(bits_per_byte(half) / exact - 1) < WORSE
    if not int8_linear.works():
        pytest.skip("no exact int8 product on this machine")
    rounded = frozen.load(frozen.BUNDLED, dtype="bfloat16")
    linear.quantize(rounded.model)
    assert abs(bits_per_byte(rounded) / exact - 1) < WORSE
    monkeypatch.setattr(int8_linear, "LARGEST", 3)  # three bits are too few
    monkeypatch.setattr(int8_linear, "works", lambda: True)
    coarse = frozen.load(frozen.BUNDLED, dtype="bfloat16")
    linear.quantize(coarse.model)
    assert bits_per_byte(coarse) / exact - 1 > WORSE
