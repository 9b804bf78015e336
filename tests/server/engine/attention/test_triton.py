"""Triton's kernels against the plain backend: under Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine import attention, engine
from server.engine.attention import BACKENDS, memory, triton
from server.engine.attention.work import Mask, Part, WorkItem
from tests.models import random_kv, random_memory, tiny_frozen
from tests.parity.harness import Case, make_engine, memory_payload, payload, recorded, run_mixed
from tests.server.engine.attention.steps import DEVICE, PREFIXES, TOLERANCES, make_step
from tests.server.engine.attention.test_memory import SHAPES, filled

IS_INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not IS_INSTALLED, reason="Triton is not installed; it comes with torch's CUDA build")
NOTHING = WorkItem(Part.OWN, Mask.FULL, 3, 3, 0, 5, 0, 0)


row = st.tuples(
    st.sampled_from([0, 0, 3, 70]),
    st.sampled_from([1, 1, 1, 2, 9, 33, 70]),
    st.sampled_from([None, *range(len(PREFIXES))]),
)


@needs_triton
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(row, min_size=1, max_size=6),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 8, 20]),
    size=st.sampled_from([16, 24, 64, 80, 128]),
    dtype=st.sampled_from(list(TOLERANCES)),
    window=st.sampled_from([0, 0, 7, 25, 90]),
    softcap=st.sampled_from([0.0, 1.5]),
    slides=st.booleans(),
    relative=st.booleans(),
    padded=st.lists(st.integers(0, 12), max_size=4),
)
def test_whatever_the_shapes_it_is_plain_attention(rows, dtype, window, relative, padded, **shape):
    step = make_step(rows, dtype=dtype, window=0 if relative else window, relative=relative, **shape)
    items = list(step.items)
    for place in padded:
        items.insert(place, NOTHING)
    got = step.by("triton", items)
    assert got.dtype is dtype
    assert step.difference(got) < TOLERANCES[dtype]


MIXED = [(5, 1, 1), (8, 1, 1), (0, 20, 1), (3, 30, 2), (9, 1, None), (0, 12, None)]


def replaced(items: list[WorkItem], which: Part, **changes: Any) -> list[WorkItem]:
    """The first item of more than one query of that part, changed."""
    index = next(i for i, item in enumerate(items) if item.part is which and item.q_hi - item.q_lo > 1)
    return [*items[:index], replace(items[index], **changes), *items[index + 1 :]]


@needs_triton
def test_a_list_that_is_off_by_one_or_names_another_prefix_is_seen():
    step = make_step(MIXED)
    assert step.difference(step.by("triton")) < 1e-5
    chunk = next(item for item in step.items if item.part is Part.OWN and item.q_hi - item.q_lo > 1)
    shared = next(item for item in step.items if item.part is Part.PREFIX and item.q_hi - item.q_lo > 1)
    other = max((item for item in step.items if item.part is Part.PREFIX), key=lambda item: item.kv_hi)
    wrong = {
        "position": replaced(step.items, Part.OWN, q_pos=chunk.q_pos - 1),
        "key left out": replaced(step.items, Part.PREFIX, kv_hi=shared.kv_hi - 1),
        "own key left out": replaced(step.items, Part.OWN, kv_lo=chunk.kv_lo + 1, kv_pos=chunk.kv_pos + 1),
        "prefix": replaced(step.items, Part.PREFIX, kv_lo=other.kv_lo, kv_hi=other.kv_hi),
        "no prefix": [item for item in step.items if item.part is Part.OWN],
        "query left out": replaced(step.items, Part.OWN, q_hi=chunk.q_hi - 1),
    }
    for name, items in wrong.items():
        assert step.difference(step.by("triton", items)) > 1e-2, name


@needs_triton
def test_parts_that_are_not_weighed_by_their_sums_are_seen(monkeypatch):
    from server.engine.attention import triton_kernels

    class Equal:
        def __getitem__(self, grid):
            def launch(partial, lse, *others, **options):
                merge[grid](partial, torch.where(lse.isfinite(), 0.0, lse), *others, **options)

            return launch

    merge, step = triton_kernels.merge_parts, make_step(MIXED)
    monkeypatch.setattr(triton_kernels, "merge_parts", Equal())
    assert step.difference(step.by("triton")) > 1e-2


@needs_triton
def test_a_query_that_sees_nothing_of_its_prefix_and_one_that_no_item_names():
    step = make_step([(0, 40, 1)], window=7)
    assert any(item.part is Part.PREFIX and item.mask is Mask.WINDOW for item in step.items)
    assert step.difference(step.by("triton")) < 1e-5
    left = step.by("triton", [replace(item, q_hi=30) for item in step.items])
    assert torch.equal(left[30:], torch.zeros_like(left[30:]))


@needs_triton
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_overflows_is_seen_in_its_row_and_in_no_other(bad):
    step = make_step([(5, 1, None), (6, 2, 0), (4, 1, 1)])
    sound = step.by("triton")
    step.values[step.items[1].kv_lo] = bad
    got = step.by("triton")
    assert not got[1:3].isfinite().any()
    assert torch.equal(got[[0, 3]], sound[[0, 3]])


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_merge_adds_what_memories_give(shape, dtype):
    heads, _, size = shape
    pool, _, draws = filled(shape, [3, 140], dtype)
    keys, values = pool.keys[1].to(DEVICE), pool.values[1].to(DEVICE)
    for numbers in (keys, values):
        numbers[290:] = torch.randn(numbers[290:].shape, generator=draws)
    query = torch.randn(heads, 12, size, generator=draws).to(DEVICE, dtype).transpose(0, 1)
    items = torch.tensor([[1, 2, 3, 0], [2, 5, 140, 1], [5, 11, 3, 0]])
    assert sorted(set(items[:, 3].tolist())) == list(range(len(memory.NAMES)))
    work = torch.tensor([WorkItem(Part.OWN, Mask.FULL, 0, 12, 290, 300, 0, 0).as_tuple()])
    options = {"window": 0, "scale": 0.3, "softcap": 0.0}
    expected = BACKENDS["plain"](query, keys, values, work, **options)
    memory.add(expected, query, keys, values, items)
    got = triton.attend(query, keys, values, work.to(DEVICE), memories=items.to(DEVICE), **options)
    assert float((got - expected).abs().max() / expected.abs().max()) < TOLERANCES[dtype]
    swapped = torch.cat([items[:, :3], 1 - items[:, 3:]], 1)
    for wrong in (items[1:], items + torch.tensor([0, 0, 1, 0]), items + torch.tensor([0, 1, 0, 0]), swapped):
        other = triton.attend(query, keys, values, work.to(DEVICE), memories=wrong.to(DEVICE), **options)
        assert not float((other - expected).abs().max() / expected.abs().max()) < 2 * TOLERANCES[dtype]


class Launches:
    """A kernel that notes its grids and computes nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.grids.append(grid)


@needs_triton
def test_nothing_is_read_on_the_host_and_launches_follow_from_shapes_alone(monkeypatch):
    """On the meta device nothing has a value: what is asked for one raises."""
    from server.engine.attention import triton_kernels

    kernels = {name: Launches() for name in ("attend_tiles", "merge_parts")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_kernels, name, kernel)

    def attend(backend: str) -> torch.Tensor:
        query, key, pool = (torch.empty(*shape, device="meta") for shape in ((40, 8, 64), (40, 2, 64), (90, 2, 64)))
        lists = {width: torch.empty(30, width, dtype=torch.long, device="meta") for width in (4, 8)}
        slots = torch.empty(40, dtype=torch.long, device="meta")
        args = (query, key, key, pool, pool.clone(), slots, lists[8], lists[4], None, 0, 0.1, 0.0, backend)
        return attention._attend(*args)

    assert attend("triton").shape == (40, 8, 64)
    # 3 queries of 4 heads an item: tiles of 16 rows, 4 queries
    assert kernels["attend_tiles"].grids == [(2 * 40 // 4 + 30, 2)]
    assert kernels["merge_parts"].grids == [(40 * 8 // triton.MERGED_ROWS,)]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        attend("plain")


@needs_triton
def test_tokens_of_an_engine_are_those_of_the_plain_backend():
    model = tiny_frozen("llama")
    shared = payload(random_kv(model, 7, seed=1), "a")
    prefixes = [shared, payload(random_kv(model, 20, seed=2), "b"), None, shared]
    prefixes.append(memory_payload(model, random_memory(model), "m", "gelu"))
    prompts = [(5, 6, 7, 8), (9, 3, 4) * 3, (9, 8), (2, 6, 7), (4, 4, 4)]
    cases = [Case(prompt, None, 3, arrives=index // 3) for index, prompt in enumerate(prompts)]
    engines = {backend: make_engine(model, backend) for backend in ("plain", "triton")}
    tokens = {backend: run_mixed(made, cases, prefixes) for backend, made in engines.items()}
    assert tokens["triton"] == tokens["plain"]
    for index in range(len(cases)):
        logits, expected = (recorded(engines[backend], str(index)) for backend in ("triton", "plain"))
        assert float((logits - expected).abs().max()) < 5e-5
    swapped = run_mixed(make_engine(model, "plain"), cases, prefixes[::-1])
    assert swapped != tokens["plain"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from server.engine.attention.triton_kernels import attend_tiles, merge_parts

HALF, FULL, LINES = "*bf16", "*fp32", "*i64"
pointers = dict(query=HALF, keys=HALF, values=HALF, output=HALF, partial=FULL, lse=FULL, bias=FULL, work=LINES)
types = {**pointers, "memories": LINES, "scale": "fp32", "softcap": "fp32"}
numbers = dict(ITEMS=64, MEMORIES=16, HEADS=6, KV_HEADS=2, GROUP=3, SIZE=80, WIDTH=128, ROWS=64, KEYS=64, ELU=0)
constants = {**numbers, "HAS_SOFTCAP": True, "HAS_BIAS": True, "WIDEN": False}
for kernel in (attend_tiles, merge_parts):
    taken = {(index,): constants[name] for index, name in enumerate(kernel.arg_names) if name in constants}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, signature, constexprs=taken), target=GPUTarget("cuda", 90, 32))
    print(len(made.asm["cubin"]), made.metadata.shared)
"""


@needs_triton
def test_kernels_compile_for_an_h200_without_one(tmp_path):
    variables = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    lines = subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout.split("\n")
    sizes = [tuple(map(int, line.split())) for line in lines if line]
    assert len(sizes) == 2
    for cubin, shared in sizes:
        assert cubin > 0
        assert shared <= 227 * 1024


@needs_triton
def test_it_is_there_where_it_computes_what_plain_does_and_not_elsewhere(monkeypatch):
    triton.is_available.cache_clear()
    assert triton.is_available(DEVICE, torch.float32, 24)
    assert not triton.is_available(DEVICE, torch.float64, 24)
    right = triton.attend

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        return right(*args, **options) + 1e-3

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("this card cannot")

    for other in (wrong, broken):
        triton.is_available.cache_clear()
        monkeypatch.setattr(triton, "attend", other)
        assert not triton.is_available(DEVICE, torch.float32, 24)
    triton.is_available.cache_clear()


def test_a_machine_without_triton_has_no_such_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    triton.is_available.cache_clear()
    assert not triton.is_available(torch.device("cpu"), torch.float32, 16)
    triton.is_available.cache_clear()


@pytest.mark.parametrize(("is_available", "expected"), [(True, "triton"), (False, "plain")])
def test_a_gpu_takes_it_where_it_is_and_a_cpu_never(monkeypatch, is_available, expected):
    monkeypatch.setattr(triton, "is_available", lambda device, dtype, size: is_available)
    model = tiny_frozen("llama")
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, geometry=model.geometry)
    assert engine.default_backend(on_gpu) == expected
    assert engine.default_backend(model) in ("native", "cpu")
