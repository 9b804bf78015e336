"""What a task costs to keep, and whether it costs more to work with a store the more there is in it.

1,000 prefixes of five virtual tokens for GPT-2 medium on disk, beside one copy of the model in the same precision; and
resolving, publishing and loading among 100 and among 100,000 prefixes, in turns, on every kind of store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prefix_store import codec, layout
from prefix_store.backends.base import Transaction
from prefix_store.backends.blobs import FolderBlobs
from prefix_store.backends.redis_blobs import RedisBlobs
from prefix_store.backends.redis_client import BLOB, BLOBS, CHUNK
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import Method, PrefixManifest, PrefixRef, PrefixVersion
from prefix_store.store import Store
from tests.bench.progress import say
from tests.bench.results import CACHE, Kept, paired_ratio
from tests.prefix_store.samples import manifest, tensors
from tests.prove.stores import Place, at_hand, place

SECTION = "store-costs"
TASKS, LENGTH = 1_000, 5
MODEL = {"n_layer": 24, "n_head": 16, "n_embd": 1024, "vocab_size": 50257}  # GPT-2 medium
SHARE, GROWTH = 0.75, 2.0
FEW, MANY, TIMES = 100, 100_000, 300
BATCH = 1_000
TENANT = "acme"
Deed = Callable[[Store, PrefixRef, int], Callable[[], object]]


def run(few: int = FEW, many: int = MANY, times: int = TIMES, tasks: int = TASKS) -> dict[str, Any]:
    """The disk first, then every kind of store; a run that was interrupted goes on with the next part."""
    full = (few, many, times, tasks) == (FEW, MANY, TIMES, TASKS)
    kept = Kept(SECTION, CACHE if full else None)
    disk = kept.part("disk", lambda: on_disk(tasks))
    kinds = {kind: kept.part(kind, lambda kind=kind: growth(kind, few, many, times)) for kind in at_hand()}
    kept.clear()
    return {"disk": disk, "few": few, "many": many, "kinds": kinds}


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    wrong = [
        f"{what} among many costs {found['ratio']} of what it costs among few on {kind}"
        for kind, costs in measured["kinds"].items()
        for what, found in costs.items()
        if found["ratio"] > GROWTH
    ]
    if measured["disk"]["share_of_model"] > SHARE:
        wrong.append(f"prefixes take {measured['disk']['share_of_model']} of a copy of the model")
    return wrong


def table(measured: dict[str, Any]) -> str:
    """For the README."""
    disk = measured["disk"]
    taken, model = (f"{disk[name] / 1e6:,.0f} MB" for name in ("bytes", "model_bytes"))
    rows = [
        f"| {kind} | " + " | ".join(f"{found['few_ms']} / {found['many_ms']}" for found in costs.values()) + " |"
        for kind, costs in measured["kinds"].items()
    ]
    return "\n".join(
        [
            f"{disk['tasks']:,} prefixes of {LENGTH} virtual tokens for GPT-2 medium take {taken} on disk, "
            f"{disk['share_of_model']:.2f} of one copy of the model ({model}) in the same precision.",
            "",
            f"| ms among {measured['few']:,} / {measured['many']:,} prefixes | resolve | publish | load |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def on_disk(tasks: int) -> dict[str, Any]:
    """Bytes that the disk gives up for so many prefixes, and those of one copy of the model."""
    geometry = ModelGeometry("gpt2", MODEL["n_layer"], MODEL["n_head"], MODEL["n_head"], 64, MODEL["n_embd"])
    made = PrefixManifest(Method.PREFIX, geometry, LENGTH, position_offset=LENGTH)
    kv = torch.randn(geometry.layers, 2, geometry.kv_heads, LENGTH, geometry.head_dim)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**MODEL))
    model_bytes = sum(parameter.numel() for parameter in model.parameters()) * kv.element_size()
    with tempfile.TemporaryDirectory(prefix="antefix-") as folder:
        store = Store.open(f"sqlite:///{folder}/store.db")
        for number in range(tasks):
            kv[0, 0, 0, 0, 0] = number
            store.prefixes.save(TENANT, f"task-{number}", made, {"self.kv": kv})
            if (number + 1) % 100 == 0:
                say(f"{number + 1} prefixes on disk")
        store.close()
        taken = sum(512 * path.stat().st_blocks for path in Path(folder).rglob("*"))
    return {
        "tasks": tasks,
        "bytes": taken,
        "model_bytes": model_bytes,
        "share_of_model": round(taken / model_bytes, 4),
    }


def growth(kind: str, few: int, many: int, times: int) -> dict[str, dict[str, float]]:
    """Medians of three deeds among few and among many, done in turns, and the median of the ratios of each pair."""
    with ExitStack() as stack:
        stores = [_filled(stack.enter_context(place(kind)), count) for count in (few, many)]
        found = {what: _compare(stores, deed, (few, many), times) for what, deed in DEEDS.items()}
        for store in stores:
            store.close()
    say(f"{kind}: " + ", ".join(f"{what} {each['ratio']}" for what, each in found.items()))
    return found


def _compare(stores: Sequence[Store], deed: Deed, counts: Sequence[int], times: int) -> dict[str, float]:
    draws = random.Random(0)
    seconds: list[list[float]] = [[], []]
    for turn in range(times):
        for index in (0, 1) if turn % 2 else (1, 0):
            act = deed(stores[index], PrefixRef(TENANT, _name(draws.randrange(counts[index]))), turn)
            begun = time.perf_counter()
            act()
            seconds[index].append(time.perf_counter() - begun)
    few, many = (round(1000 * statistics.median(each), 3) for each in seconds)
    return {"few_ms": few, "many_ms": many, "ratio": round(paired_ratio(seconds[1], seconds[0]), 2)}


def _resolve(store: Store, ref: PrefixRef, turn: int) -> Callable[[], object]:
    return partial(store.prefixes.resolve, ref)


def _publish(store: Store, ref: PrefixRef, turn: int) -> Callable[[], object]:
    return partial(store.prefixes.save, TENANT, f"new-{turn}", manifest(), tensors(manifest(), turn))


def _load(store: Store, ref: PrefixRef, turn: int) -> Callable[[], object]:
    return partial(store.prefixes.read, store.prefixes.resolve(ref))


# what is measured, after its preparation
DEEDS: dict[str, Deed] = {"resolve": _resolve, "publish": _publish, "load": _load}


def _name(number: int) -> str:
    return f"task-{number:06d}"


def _filled(where: Place, count: int) -> Store:
    """A store with so many prefixes, each with a file of its own, laid down many at a time."""
    store = Store.open(where.url)
    first = store.prefixes.save(TENANT, "first", manifest(), tensors(manifest()))
    data = codec.encode(manifest(), tensors(manifest()))
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        files = {number: data[:-4] + number.to_bytes(4, "little") for number in numbers}  # the last value, near nought
        versions = [_version(first, number, file) for number, file in files.items()]
        _lay_down(store, {version.digest: files[number] for number, version in zip(numbers, versions, strict=True)})
        store.backend.write(lambda transaction, versions=versions: _write(transaction, versions))
    say(f"{where.kind}: {count} prefixes laid down")
    return store


def _version(first: PrefixVersion, number: int, file: bytes) -> PrefixVersion:
    return dataclasses.replace(first, name=_name(number), digest=hashlib.sha256(file).hexdigest())


def _write(transaction: Transaction, versions: list[PrefixVersion]) -> None:
    for version in versions:
        place_ = version.tenant, version.name, version.version
        transaction.put(layout.name(version.tenant, version.name), {"last": 1, "current": 1})
        transaction.put(layout.version(*place_), version.to_json())
        transaction.put(layout.blob_of_version(version.digest, *place_), {})


def _lay_down(store: Store, files: dict[str, bytes]) -> None:
    """As `put` does, without waiting for the disk at each."""
    if isinstance(store.blobs, FolderBlobs):
        for digest, data in files.items():
            path = store.blobs._path(digest)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.write_bytes(data)
        return
    assert isinstance(store.blobs, RedisBlobs)
    with store.blobs._client.pipeline(transaction=False) as pipeline:
        for digest, data in files.items():
            pipeline.sadd(BLOBS, digest)
            pipeline.set(CHUNK.format(digest=digest, number=0), data)
            pipeline.set(BLOB.format(digest=digest), len(data))
        pipeline.execute()
