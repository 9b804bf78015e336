"""From a stored version to what the engine takes: read, verified, cast, kept in host memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from prefix_store.errors import OutOfMemory, PrefixMismatch
from prefix_store.geometry import Stack
from prefix_store.model import shortage
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixManifest, PrefixVersion, Window
from prefix_store.store import PrefixStore
from prefix_store.tensors import PAYLOADS, STACKS, PrefixTensors, is_within
from server.distribution import SHORT_SECONDS, Distribution, Reading
from server.engine.kv_pool import memory_slots
from server.scheduler.messages import PrefixPayload


@dataclass(frozen=True)
class LoadedPrefix:
    """A prefix in host memory, and the template its text prompts go through."""

    payload: PrefixPayload
    template: str | None

    @property
    def size_bytes(self) -> int:
        """Host memory it takes."""
        tensors: list[torch.Tensor | None] = [self.payload.tensor, self.payload.cross, self.payload.encoder]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class HostStats:
    """A snapshot for metrics, of what is in host memory. `loads`: seconds of bringing one from the store."""

    prefixes_resident: int
    prefix_bytes: int
    prefix_hits: int
    prefix_misses: int
    prefix_evictions: int
    loads: Reading


class PrefixLoader:
    """An LRU of loaded prefixes keyed by digest, so a replaced or deleted name can never serve stale numbers.

    What is kept on the device is kept here too, beside the budget: its requests shall not wait for a disk.

    Safe to call from any thread; a digest that several callers ask for is read once.
    """

    def __init__(self, prefixes: PrefixStore, frozen: FrozenModel, budget_bytes: int) -> None:
        self._prefixes = prefixes
        self._frozen = frozen
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Future[LoadedPrefix]] = OrderedDict()
        self._sizes: dict[str, int] = {}  # of those that have been read
        self._kept: set[str] = set()
        self._total = 0  # bytes of what has been read and is not kept
        self._hits = self._misses = self._evictions = 0
        self._loads = Distribution(SHORT_SECONDS)

    def load(self, version: PrefixVersion) -> LoadedPrefix:
        """Blocks while reading. Raises PrefixMismatch, StoreCorrupt, or OutOfMemory where the host has no more."""
        with self._lock:
            future = self._loaded.get(version.digest)
            if owner := future is None:
                future = self._loaded[version.digest] = Future()
            self._loaded.move_to_end(version.digest)
            self._hits += not owner
            self._misses += owner
        if owner:
            self._fill(future, version)
        return future.result()

    def find(self, version: PrefixVersion) -> LoadedPrefix | None:
        """What `load` would return at once; None where it would read, or wait."""
        with self._lock:
            future = self._loaded.get(version.digest)
            if future is None or not future.done() or future.exception() is not None:
                return None
            self._loaded.move_to_end(version.digest)
            self._hits += 1
        return future.result()

    def keep(self, digest: str) -> None:
        """Has a prefix stay, whatever is loaded after it."""
        with self._lock:
            if digest not in self._kept:
                self._total -= self._sizes.get(digest, 0)
            self._kept.add(digest)

    def free(self, digest: str) -> None:
        """Ends `keep`; it goes in its turn."""
        with self._lock:
            if digest in self._kept:
                self._total += self._sizes.get(digest, 0)
            self._kept.discard(digest)

    def stats(self) -> HostStats:
        """A consistent snapshot."""
        with self._lock:
            return HostStats(
                prefixes_resident=len(self._sizes),
                prefix_bytes=sum(self._sizes.values()),
                prefix_hits=self._hits,
                prefix_misses=self._misses,
                prefix_evictions=self._evictions,
                loads=self._loads.read(),
            )

    def _fill(self, future: Future[LoadedPrefix], version: PrefixVersion) -> None:
        begun = time.perf_counter()
        try:
            loaded = self._read(version)
        except BaseException as caught:
            error = OutOfMemory() if shortage.ran_out(caught) else caught
            with self._lock:
                self._loaded.pop(version.digest, None)  # the next caller tries again
            future.set_exception(error)
        else:
            with self._lock:
                self._note(version.digest, loaded.size_bytes)
                self._loads.add(time.perf_counter() - begun)
            future.set_result(loaded)

    def _read(self, version: PrefixVersion) -> LoadedPrefix:
        manifest, tensors = self._prefixes.read(version)
        self._frozen.check_fits(manifest)
        return LoadedPrefix(payload_of(version.digest, manifest, tensors, self._frozen.dtype), manifest.template)

    def _note(self, newest: str, size: int) -> None:
        """Counts what was just read, which stays, however large; what was not asked for the longest goes for it."""
        self._sizes[newest] = size
        self._total += 0 if newest in self._kept else size
        leaving: list[str] = []
        for digest in self._loaded:
            if self._total <= self._budget:
                break
            if digest in self._sizes and digest not in self._kept and digest != newest:
                self._total -= self._sizes[digest]
                leaving.append(digest)
        for digest in leaving:
            del self._loaded[digest], self._sizes[digest]
        self._evictions += len(leaving)


def served_tensors(tensors: PrefixTensors, dtype: torch.dtype) -> PrefixTensors:
    """A prefix's canonical tensors in the model's dtype. Raises PrefixMismatch for values that overflow the dtype."""
    served = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    if not all(is_within(tensor, torch.finfo(dtype).max) for tensor in served.values()):
        raise PrefixMismatch(f"the prefix has values that overflow this server's {dtype}", param="file")
    return served


def payload_of(digest: str, manifest: PrefixManifest, tensors: PrefixTensors, dtype: torch.dtype) -> PrefixPayload:
    """What the engine takes. Raises what `served_tensors` raises.

    A soft prompt of an encoder-decoder model stands before each source, where it moves no position of the answer's.
    What its places hold depends on the source, all of which they see, so it cannot become keys and values once for all.
    """
    served = served_tensors(tensors, dtype)
    in_source = manifest.method is Method.PROMPT and manifest.geometry.encoder is not None
    return PrefixPayload(
        digest=digest,
        virtual_tokens=manifest.virtual_tokens,
        position_offset=0 if in_source else manifest.position_offset,
        slides=manifest.window is Window.SLIDES,
        tensor=served.get(PAYLOADS[manifest.method]),
        is_embeds=manifest.method is Method.PROMPT,
        feature_map=manifest.feature_map,
        memory_slots=memory_slots(manifest.geometry) if manifest.method is Method.PREFIX_PLUS else 0,
        stacks=() if in_source else manifest.stacks,
        cross=served.get(STACKS[Stack.CROSS]),
        encoder=served.get(STACKS[Stack.ENCODER]),
    )
