import pytest
import torch

from prefix_store.geometry import ModelGeometry, Stack
from server.engine.kv_pool import KVPool, bytes_per_slot, memory_halves, memory_slots
from server.scheduler.messages import PrefixPayload
from server.scheduler.plan import Load, Move
from server.scheduler.slots import Extent
from tests.models import random_kv, random_kvs, random_memory, tiny_frozen


def test_loads_and_moves_put_every_layer_in_place():
    model = tiny_frozen("llama")
    pool = KVPool(model.geometry, 32, dtype=torch.float32, device=torch.device("cpu"))
    kv = random_kv(model, 5)
    pool.apply(Load(PrefixPayload("p", 5, 5, True, kv), Extent(3, 5)))
    for layer in range(model.geometry.layers):
        assert torch.equal(pool.keys[layer, 3:8], kv[layer, 0].transpose(0, 1))
        assert torch.equal(pool.values[layer, 3:8], kv[layer, 1].transpose(0, 1))
    assert pool.keys[:, :3].abs().sum() == pool.keys[:, 8:].abs().sum() == 0
    pool.apply(Move(Extent(3, 5), Extent(20, 8), 4))
    assert torch.equal(pool.keys[:, 20:24], pool.keys[:, 3:7])
    assert torch.equal(pool.values[:, 20:24], pool.values[:, 3:7])
    assert pool.values[:, 24:].abs().sum() == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_memory_lies_in_its_slots_and_nowhere_else(family):
    model = tiny_frozen(family)
    pool = KVPool(model.geometry, 64, dtype=torch.float32, device=torch.device("cpu"))
    memory, slots = random_memory(model), memory_slots(model.geometry)
    assert slots * bytes_per_slot(model.geometry, torch.float32) == memory.nbytes  # not a number is wasted
    pool.apply(Load(PrefixPayload("p", 0, 0, True, memory, feature_map="elu", memory_slots=slots), Extent(5, slots)))
    for layer in range(model.geometry.layers):
        halves = memory_halves(pool.keys[layer], pool.values[layer], 5, model.geometry.query_heads)
        assert torch.equal(torch.cat(halves), memory[layer])
        assert all(half.untyped_storage().data_ptr() in held(pool) for half in halves), "a copy was made"
    for part in (pool.keys, pool.values):
        assert part[:, :5].abs().sum() == part[:, 5 + slots :].abs().sum() == 0


def held(pool: KVPool) -> set[int]:
    return {pool.keys.untyped_storage().data_ptr(), pool.values.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "slots"),
    [(12, 12, 64, 32), (32, 8, 128, 256), (25, 25, 64, 34), (1, 1, 8, 8), (7, 1, 64, 256)],
)
def test_a_memory_takes_as_many_slots_as_its_larger_half_of_heads_needs(heads, kv_heads, size, slots):
    assert memory_slots(ModelGeometry("gpt2", 2, heads, kv_heads, size, heads * size)) == slots


def test_bytes_per_slot_is_what_the_pool_takes():
    geometry = tiny_frozen("qwen3").geometry
    pool = KVPool(geometry, 10, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert pool.keys.nbytes + pool.values.nbytes == (10 + 1) * bytes_per_slot(geometry, torch.bfloat16)


def test_each_stack_of_a_prefix_goes_into_its_own_layers():
    model = tiny_frozen("bart")
    pool = KVPool(model.geometry, 30, dtype=torch.float32, device=torch.device("cpu"))
    kv = random_kvs(model, 5, seed=0)
    whole = PrefixPayload(
        "p", 5, 5, True, kv[Stack.SELF], stacks=tuple(Stack), cross=kv[Stack.CROSS], encoder=kv[Stack.ENCODER]
    )
    pool.apply(Load(whole, Extent(3, 10)))
    pool.apply(Load(PrefixPayload("c", 5, 0, True, None, stacks=(Stack.CROSS,), cross=kv[Stack.CROSS]), Extent(20, 5)))
    for stack, first in ((Stack.SELF, 3), (Stack.CROSS, 8), (Stack.ENCODER, 3), (Stack.CROSS, 20)):
        for index, numbers in enumerate(pool.of(stack)):
            assert torch.equal(numbers[:, first : first + 5].transpose(1, 2), kv[stack][:, index])
    assert pool.of(Stack.SELF)[0] is pool.of(Stack.CROSS)[0]
    assert pool.of(Stack.ENCODER)[0].shape == (2, 31, 4, 12)
    assert not pool.of(Stack.ENCODER)[0][:, 8:].any()
