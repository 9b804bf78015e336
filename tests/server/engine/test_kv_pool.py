import torch

from server.engine.kv_pool import KVPool, bytes_per_slot
from server.scheduler.messages import PrefixPayload
from server.scheduler.plan import Load, Move
from server.scheduler.slots import Extent
from tests.models import random_kv, tiny_frozen


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


def test_bytes_per_slot_is_what_the_pool_takes():
    geometry = tiny_frozen("qwen3").geometry
    pool = KVPool(geometry, 10, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert pool.keys.nbytes + pool.values.nbytes == 10 * bytes_per_slot(geometry, torch.bfloat16)
