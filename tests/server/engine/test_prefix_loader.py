"""What stays in host memory: by when it was asked for last, within the budget, and whatever is kept beside it."""

from __future__ import annotations

import pytest
import torch

from prefix_store import codec
from prefix_store.errors import OutOfMemory
from prefix_store.prefix import PrefixVersion
from prefix_store.store import Store
from server.engine.prefix_loader import PrefixLoader
from tests.models import tiny_frozen
from tests.server import artefacts

FROZEN = tiny_frozen("llama")
SIZE = 3 * 2 * 2 * 5 * 8 * 4  # layers, keys and values, heads, virtual tokens, numbers, bytes


@pytest.fixture
def versions(store: Store, tmp_path) -> list[PrefixVersion]:
    found = []
    for index in range(4):
        path = tmp_path / f"{index}"
        path.write_bytes(artefacts.native(FROZEN, 5, seed=index))
        found.append(store.prefixes.save("default", f"p{index}", *codec.decode(path)))
    return found


def held(loader: PrefixLoader, versions: list[PrefixVersion]) -> list[int]:
    return [index for index, version in enumerate(versions) if version.digest in loader._loaded]


def test_what_was_not_asked_for_the_longest_goes(store: Store, versions: list[PrefixVersion]) -> None:
    loader = PrefixLoader(store.prefixes, FROZEN, 2 * SIZE)
    for index in (0, 1, 0, 2):
        assert loader.load(versions[index]).size_bytes == SIZE
    assert held(loader, versions) == [0, 2]
    loader.load(versions[3])
    assert held(loader, versions) == [2, 3]


def test_what_is_there_is_found_and_what_is_not_is_not_read(store: Store, versions: list[PrefixVersion]) -> None:
    loader = PrefixLoader(store.prefixes, FROZEN, 2 * SIZE)
    assert loader.find(versions[0]) is None
    loaded = [loader.load(versions[index]) for index in (0, 1)]
    assert loader.find(versions[0]) is loaded[0]
    loader.load(versions[2])
    assert held(loader, versions) == [0, 2], "to find one is to ask for it"
    stats = loader.stats()
    assert (stats.prefix_hits, stats.prefix_misses) == (1, 3)


def test_what_is_kept_stands_beside_the_budget(store: Store, versions: list[PrefixVersion]) -> None:
    loader = PrefixLoader(store.prefixes, FROZEN, 2 * SIZE)
    loader.keep(versions[0].digest)
    for index in (0, 1, 2, 3):
        loader.load(versions[index])
    assert held(loader, versions) == [0, 2, 3]
    loader.free(versions[0].digest)
    loader.free(versions[0].digest)
    loader.load(versions[1])
    assert held(loader, versions) == [1, 3]


def test_one_that_is_larger_than_the_budget_stays_until_the_next(store: Store, versions: list[PrefixVersion]) -> None:
    loader = PrefixLoader(store.prefixes, FROZEN, SIZE // 2)
    for index in (0, 1):
        loader.load(versions[index])
        assert held(loader, versions) == [index]


def test_what_was_there_and_what_was_read_is_counted(store: Store, versions: list[PrefixVersion]) -> None:
    loader = PrefixLoader(store.prefixes, FROZEN, 2 * SIZE)
    loader.keep(versions[0].digest)
    for index in (0, 1, 1, 2, 3):
        loader.load(versions[index])
    found = loader.stats()
    assert (found.prefix_hits, found.prefix_misses, found.prefix_evictions) == (1, 4, 1)
    assert (found.prefixes_resident, found.prefix_bytes) == (3, 3 * SIZE)
    assert (found.loads.counts[-1], found.loads.total > 0) == (4, True)


def test_one_that_the_host_has_no_memory_for_says_so_and_is_read_by_the_next_caller(
    store: Store, versions: list[PrefixVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = PrefixLoader(store.prefixes, FROZEN, 2 * SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(store.prefixes, "read", lambda version: torch.empty(2**62, dtype=torch.uint8))
        with pytest.raises(OutOfMemory):
            loader.load(versions[0])
    assert loader.load(versions[0]).payload.digest == versions[0].digest


def test_one_that_cannot_be_read_is_a_miss_and_no_load(
    store: Store, versions: list[PrefixVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = PrefixLoader(store.prefixes, FROZEN, 2 * SIZE)
    monkeypatch.setattr(store.prefixes, "read", lambda version: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loader.load(versions[0])
    found = loader.stats()
    assert (found.prefix_misses, found.loads.counts[-1], found.prefixes_resident) == (1, 0, 0)
