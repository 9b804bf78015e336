"""What memories add, against the formula written out row by row and head by head."""

from __future__ import annotations

import pytest
import torch

from prefix_store.geometry import ModelGeometry
from server.engine.attention import memory
from server.engine.attention.memory import MemoryItem, memory_items
from server.engine.kv_pool import KVPool, memory_slots
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.plan import Load, Row
from server.scheduler.residency import Resident
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence
from server.scheduler.slots import Extent

SHAPES = [(6, 2, 8), (6, 6, 8), (5, 5, 4), (3, 1, 16), (1, 1, 8), (8, 2, 64)]
ELU, GELU = memory.NAMES.index("elu"), memory.NAMES.index("gelu")


def geometry(heads: int, kv_heads: int, size: int) -> ModelGeometry:
    return ModelGeometry("llama", 2, heads, kv_heads, size, heads * size)


def filled(
    shape: tuple[int, int, int], starts: list[int], dtype: torch.dtype = torch.float32
) -> tuple[KVPool, list[torch.Tensor], torch.Generator]:
    """A pool of NaN with a random memory at each start, the memories, and more draws."""
    numbers, draws = geometry(*shape), torch.Generator().manual_seed(0)
    pool = KVPool(numbers, 300, dtype=dtype, device=torch.device("cpu"))
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    made = [torch.randn(2, shape[0], shape[2], shape[2], generator=draws) for _ in starts]
    slots = memory_slots(numbers)
    for start, one in zip(starts, made, strict=True):
        payload = PrefixPayload("m", 0, 0, True, one, feature_map="elu", memory_slots=slots)
        pool.apply(Load(payload, Extent(start, payload.slots)))
    return pool, made, draws


def phi(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "elu":
        return torch.where(x > 0, x, x.exp() - 1)
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", [0, 1])
def test_equals_the_formula_written_out(shape, layer):
    heads, kv_heads, size = shape
    slots = memory_slots(geometry(*shape))
    assert slots == -(-heads * size // (2 * kv_heads)) or heads % 2
    pool, made, draws = filled(shape, [3, 3 + slots])  # side by side, with not a number around them
    query = torch.randn(heads, 12, size, generator=draws).transpose(0, 1)  # as a model hands it over
    output = torch.randn(12, heads, size, generator=draws)
    before = output.clone()
    items = [MemoryItem(1, 2, 3, ELU), MemoryItem(2, 5, 3 + slots, GELU), MemoryItem(5, 11, 3, ELU)]
    work = torch.tensor([item.as_tuple() for item in items])
    memory.add(output, query, pool.keys[layer], pool.values[layer], work)
    assert torch.equal(output[[0, 11]], before[[0, 11]])
    which = {1: (0, "elu"), 2: (1, "gelu"), 3: (1, "gelu"), 4: (1, "gelu")} | dict.fromkeys(range(5, 11), (0, "elu"))
    for token, (index, name) in which.items():
        for head in range(heads):
            expected = before[token, head] + phi(name, query[token, head]) @ made[index][layer, head]
            assert float((output[token, head] - expected).abs().max()) < 1e-5


def test_a_row_gives_the_same_bits_however_many_share_its_memory():
    if not torch.backends.mkl.is_available():
        pytest.skip("another library's products may differ by rounding, which is 1e-6 of the largest number")
    pool, _, draws = filled((8, 2, 64), [0])
    query = torch.randn(40, 8, 64, generator=draws)
    together = torch.zeros_like(query)
    memory.add(together, query, pool.keys[0], pool.values[0], torch.tensor([[0, 40, 0, ELU]]))
    for count in (1, 2, 3, 4, 5, 9, 17):
        some = torch.zeros_like(query)
        memory.add(some, query, pool.keys[0], pool.values[0], torch.tensor([[7, 7 + count, 0, ELU]]))
        assert torch.equal(some[7 : 7 + count], together[7 : 7 + count])


def test_what_overflows_stays_in_its_rows():
    pool, _, draws = filled((6, 2, 8), [0, 20])
    query, output = torch.randn(4, 6, 8, generator=draws), torch.zeros(4, 6, 8)
    items = torch.tensor([[0, 2, 0, ELU], [2, 4, 20, ELU]])
    memory.add(output, query, pool.keys[0], pool.values[0], items)
    sound = output.clone()
    pool.keys[0, 0:12] = 3e38
    memory.add(output.zero_(), query, pool.keys[0], pool.values[0], items)
    assert not output[:2].isfinite().all()
    assert torch.equal(output[2:], sound[2:])


def test_half_precision_rounds_as_the_pool_does():
    pool, made, draws = filled((6, 2, 8), [0], torch.bfloat16)
    query = torch.randn(3, 6, 8, generator=draws).bfloat16()
    output = torch.zeros(3, 6, 8, dtype=torch.bfloat16)
    memory.add(output, query, pool.keys[1], pool.values[1], torch.tensor([[0, 3, 0, ELU]]))
    expected = torch.einsum("thd,hde->the", phi("elu", query.float()), made[0][1])
    assert float((output - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_rows_that_share_a_memory_are_one_item():
    slots = memory_slots(geometry(6, 2, 8))
    residents = [
        Resident(PrefixPayload("elu", 0, 0, True, None, feature_map="elu", memory_slots=slots), Extent(0, slots)),
        Resident(PrefixPayload("gelu", 0, 0, True, None, feature_map="gelu", memory_slots=slots), Extent(20, slots)),
        Resident(PrefixPayload("kv", 4, 4, True, None), Extent(50, 4)),
    ]
    rows = []
    for index, (resident, count) in enumerate([(None, 2), (0, 1), (0, 5), (1, 1), (2, 3), (0, 1), (None, 2), (0, 1)]):
        request = GenerationRequest("r", "t", (1,) * 6, SamplingParams())
        own = Extent(60 + 10 * index, 10)
        sequence = Sequence(request, 0, extent=own, resident=None if resident is None else residents[resident])
        rows.append(Row(sequence, 0, count))
    expected = [(2, 8, 0, ELU), (8, 9, 20, GELU), (12, 13, 0, ELU), (15, 16, 0, ELU)]
    assert memory_items(rows) == [MemoryItem(*numbers) for numbers in expected]
    assert memory_items(rows[:1]) == []
