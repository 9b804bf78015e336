"""Whether the device computes what it should. Each check has a control, which must be told from what is right."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from prefix_store.model.frozen import FrozenModel
from server.engine import self_test
from server.engine.attention.work import Part
from server.engine.engine import Engine, default_backend
from server.engine.step_graphs import CudaRecorder, Recorder
from tests.bench.gpu import machine
from tests.bench.gpu.sizes import Setup
from tests.models import random_kv, tiny_frozen
from tests.parity.harness import Case, make_engine, payload, plain_logits, recorded, request, run_mixed
from tests.server.engine.attention.steps import PREFIXES, TOLERANCES, make_step
from tests.server.engine.recording import again

Found = Iterator[tuple[str, dict[str, Any]]]
NEW = 8
# A prompt, which of two prefixes stands before it, and when it comes.
ROWS = (((5, 6, 7, 8), 0, 0), ((9, 3, 4) * 5, 1, 0), ((2, 7), None, 1), ((40, 30, 20, 10, 11), 0, 2), ((8, 8, 3), 1, 2))
LENGTHS = (7, 20)


def parity(setup: Setup) -> Found:
    """Every family in float32: rows of a mixed batch against each alone in transformers, on the same device."""
    for family in setup.size.families:
        yield family, machine.tried(setup.device, lambda family=family: agreement(_tiny(setup, family)))
    for family in setup.size.pairs:
        yield f"{family}, at load", machine.tried(setup.device, lambda family=family: _loads(_tiny(setup, family)))


def half(setup: Setup) -> Found:
    """In bfloat16 against the same weights in float32: some models of full size, and tiny ones."""
    makers: dict[str, Callable[[], FrozenModel]] = {
        shape.name: lambda shape=shape: shape.frozen(torch.bfloat16, device=setup.device)
        for shape in setup.size.oracles
    }
    makers |= {family: lambda family=family: _tiny(setup, family, torch.bfloat16) for family in setup.size.families}
    for name, make in makers.items():
        yield name, machine.tried(setup.device, lambda make=make: agreement(make()))


def backend(setup: Setup) -> Found:
    """The device's attention backend against the plain one, over steps of all shapes."""
    draw, worst = random.Random(0), dict.fromkeys(TOLERANCES, 0.0)
    names = {dtype: default_backend(_tiny(setup, "llama", dtype)) for dtype in TOLERANCES}
    is_own = setup.device == "cpu" or set(names.values()) == {"triton"}
    control: float | None = None
    for number in range(setup.size.fuzzed):
        dtype = list(TOLERANCES)[number % len(TOLERANCES)]
        step, name = make_step(**_drawn(draw), dtype=dtype), names[dtype]
        worst[dtype] = max(worst[dtype], step.difference(step.by(name)))
        # without the last key of each prefix, which rounding to half precision could hide
        short = [replace(item, kv_hi=item.kv_hi - (item.part is Part.PREFIX)) for item in step.items]
        if dtype is torch.float32 and short != step.items and not step.options["window"]:
            control = min(control or torch.inf, step.difference(step.by(name, short)))
        is_told = control is None or control > 2 * TOLERANCES[torch.float32]
        yield (
            "shapes",
            {
                "backend": sorted(set(names.values())),
                "steps": number + 1,
                "worst": {str(kind): found for kind, found in worst.items()},
                "tolerance": {str(kind): least for kind, least in TOLERANCES.items()},
                "control": control,
                "passed": is_own and is_told and all(worst[kind] < TOLERANCES[kind] for kind in worst),
            },
        )


def same_bits(setup: Setup) -> Found:
    """The same requests give the same bits again; played as CUDA graphs those of the same padded steps run anew; and
    with steps launched before the last is read, as they are served, the tokens of one by one, whole and in pieces.
    """
    frozen = _tiny(setup, "llama", setup.size.dtype)
    is_gpu = setup.device != "cpu"
    yield "again", _same(frozen, make_engine, make_engine)
    if is_gpu:
        yield "graphs", _same(frozen, partial(_recorded, record=CudaRecorder()), partial(_recorded, record=again))
    yield "ahead", _same_tokens(frozen, is_gpu)
    if is_gpu:
        yield "waits", machine.tried(setup.device, lambda: _waits_for_nothing(frozen))


def _same_tokens(frozen: FrozenModel, is_gpu: bool) -> dict[str, Any]:
    kvs = _kvs(frozen)
    expected = _run(_served(frozen, is_gpu, ahead=False), kvs)
    control = _run(_served(frozen, is_gpu, ahead=True), kvs[::-1]) != expected
    whole, pieces = (_run(_served(frozen, is_gpu, ahead=True, most=most), kvs) for most in (None, 2))
    return {"passed": control and whole == pieces == expected, "control": control}


def _waits_for_nothing(frozen: FrozenModel) -> dict[str, Any]:
    """Torch refuses what would make the host wait, but for the token that is read."""
    engine = _served(frozen, True, ahead=True)
    for index, (prompt, _, _) in enumerate(ROWS):
        engine.scheduler.add(request(str(index), Case(prompt, None, 4 * NEW), None), seed=index)
    for _ in range(NEW):
        engine.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(NEW):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"passed": engine.is_ahead}


def _served(frozen: FrozenModel, is_gpu: bool, *, ahead: bool, most: int | None = None) -> Engine:
    """An engine as it serves, with nothing that looks at its logits; `most` tokens at a time, as after a shortage."""
    engine = make_engine(frozen)
    engine.runner = engine.runner._runner  # type: ignore[attr-defined]
    engine.runs_ahead = ahead
    if is_gpu:
        engine.runner.record(CudaRecorder(), engine.limits)
    if most is not None:
        engine._room.tokens = most
    return engine


def _same(frozen: FrozenModel, one: Callable[..., Engine], other: Callable[..., Engine]) -> dict[str, Any]:
    kvs = _kvs(frozen)
    expected = _bits(other(frozen), kvs)
    control = not torch.equal(_bits(one(frozen), kvs[::-1]), expected)
    return {"passed": torch.equal(_bits(one(frozen), kvs), expected) and control, "control": control}


def _recorded(frozen: FrozenModel, record: Recorder) -> Engine:
    engine = make_engine(frozen)
    engine.runner._runner.record(record, engine.limits)  # type: ignore[attr-defined]
    return engine


def agreement(frozen: FrozenModel, served: Sequence[int] = (0, 1)) -> dict[str, Any]:
    """A mixed batch against the plain model in float32, token by token after what was generated.

    A token must be the plain model's wherever that has a best one by more than the row's logits differ by. `served`:
    which prefixes the engine takes for the first and for the second; for a test of this very check.
    """
    kvs = _kvs(frozen)
    oracle = copy.deepcopy(frozen.model).float()
    tolerance = self_test.TOLERANCES[frozen.dtype]
    engine = make_engine(frozen)
    tokens = _run(engine, [kvs[number] for number in served])
    worst = control = 0.0
    counted = decided = wrong = 0
    for index, ((prompt, number, _), new) in enumerate(zip(ROWS, tokens, strict=True)):
        logits = recorded(engine, str(index))
        expected = _expected(oracle, (*prompt, *new), None if number is None else kvs[number])
        apart = _apart(logits, expected)
        worst = max(worst, apart)
        if number is not None:
            other = _expected(oracle, (*prompt, *new), kvs[1 - number])
            control = min(control or torch.inf, _apart(logits, other))
        best = expected.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2 * apart * expected.abs().max()
        wrong += int((clear & (expected.argmax(-1) != torch.tensor(new))).sum())
        counted, decided = counted + len(new), decided + int(clear.sum())
    passed = worst <= tolerance and wrong == 0 and control > 2 * worst
    return {
        "worst": worst, "tolerance": tolerance, "control": control, "tokens": counted, "decided": decided,
        "wrong": wrong, "backend": default_backend(frozen), "passed": passed,
    }  # fmt: skip


def _run(engine: Engine, kvs: Sequence[torch.Tensor]) -> list[list[int]]:
    cases = [Case(prompt, None if n is None else kvs[n], NEW, arrives) for prompt, n, arrives in ROWS]
    prefixes = [None if n is None else payload(kvs[n], str(n)) for _, n, _ in ROWS]
    tokens = run_mixed(engine, cases, prefixes)
    return [tokens[str(index)] for index in range(len(ROWS))]


def _bits(engine: Engine, kvs: Sequence[torch.Tensor]) -> torch.Tensor:
    _run(engine, kvs)
    return torch.cat([recorded(engine, str(index)) for index in range(len(ROWS))])


def _expected(oracle: Any, ids: Sequence[int], kv: torch.Tensor | None) -> torch.Tensor:
    """`[NEW, V]`: what predicts the last tokens."""
    return plain_logits(oracle, ids[:-1], kv)[-NEW:].float().cpu()


def _apart(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest logit."""
    return float(((logits - expected).abs().max() / expected.abs().max()).nan_to_num(torch.inf))


def _kvs(frozen: FrozenModel) -> list[torch.Tensor]:
    """As the model's dtype holds them, so that nothing but arithmetic differs."""
    return [random_kv(frozen, length, seed=length).to(frozen.dtype).float() for length in LENGTHS]


def _tiny(setup: Setup, family: str, dtype: torch.dtype = torch.float32) -> FrozenModel:
    frozen = tiny_frozen(family)
    frozen.model.to(setup.device, dtype)
    return frozen


def _loads(frozen: FrozenModel) -> dict[str, Any]:
    """An engine refuses at load what it would serve wrong."""
    make_engine(frozen)
    return {"passed": True}


def _drawn(draw: random.Random) -> dict[str, Any]:
    prefixes = [None, *range(len(PREFIXES))]
    row = [(draw.choice([0, 0, 3, 70]), draw.choice([1, 1, 1, 2, 9, 33, 70]), draw.choice(prefixes)) for _ in range(6)]
    return {
        "rows": row[: draw.randint(1, 6)],
        "kv_heads": draw.choice([1, 2, 3]),
        "group": draw.choice([1, 2, 4, 8]),
        "size": draw.choice([16, 64, 80, 128]),
        "window": draw.choice([0, 0, 7, 90]),
        "softcap": draw.choice([0.0, 0.0, 1.5]),
        "slides": draw.random() < 0.5,
    }
