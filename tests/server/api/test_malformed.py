"""Uploads that must not hurt: each a 4xx with a reason, nothing is stored or left on disk, the server answers."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from httpx import ASGITransport, AsyncClient, Response
from safetensors.torch import save
from starlette.testclient import TestClient

from prefix_store import codec
from prefix_store.migration import fingerprint
from prefix_store.safetensors_file import MAX_HEADER
from prefix_store.store import Store
from server.app import create_app
from server.engine.prefix_loader import PrefixLoader
from tests.models import random_kv, tiny_frozen
from tests.prefix_store.samples import raw
from tests.server import artefacts
from tests.server.fakes import FakeLoop

FROZEN = tiny_frozen("llama")
GOOD = artefacts.native(FROZEN)
LENGTH = int.from_bytes(GOOD[:8], "little")
HEADER: dict[str, Any] = json.loads(GOOD[8 : 8 + LENGTH])
DATA = GOOD[8 + LENGTH :]
MANIFEST: dict[str, Any] = json.loads(HEADER["__metadata__"]["antefix"])
KV = "self.kv"
FLIPS = 2000


def entry(**changes: Any) -> bytes:
    """The file with another declaration of its tensor; what is None is left out."""
    declared = {name: value for name, value in {**HEADER[KV], **changes}.items() if value is not None}
    return raw({"__metadata__": HEADER["__metadata__"], KV: declared}, DATA)


def manifest(**changes: Any) -> bytes:
    changed = {name: value for name, value in {**MANIFEST, **changes}.items() if value is not ...}
    return metadata({"antefix": json.dumps(changed)})


def metadata(value: Any) -> bytes:
    return raw({"__metadata__": value, KV: HEADER[KV]}, DATA)


def header(text: bytes) -> bytes:
    return raw(text, DATA)


def value(number: float) -> bytes:
    return raw(HEADER, struct.pack("<f", number) + DATA[4:])


def tensors(**named: torch.Tensor) -> bytes:
    return save(named, {"antefix": HEADER["__metadata__"]["antefix"]})


def long_prefix() -> bytes:
    """One that fits the model, but leaves no room in its context."""
    length = FROZEN.context_length - 1
    return artefacts.native(FROZEN, length)


TEXT = json.dumps(HEADER).encode()
SIZE = len(DATA)
SHAPE: list[int] = HEADER[KV]["shape"]
FILES: dict[str, bytes] = {
    # not even a beginning
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a length of nothing": b"\0" * 8,
    "only a length": GOOD[:8],
    "half a header": GOOD[: 8 + LENGTH // 2],
    "a header of 4 exabytes": (1 << 62).to_bytes(8, "little") + GOOD[8:],
    "a header of all bits": b"\xff" * 8 + GOOD[8:],
    "a header over the cap": header(TEXT + b" " * MAX_HEADER),
    "a length one too short": (LENGTH - 1).to_bytes(8, "little") + GOOD[8:],
    "a length one too long": (LENGTH + 1).to_bytes(8, "little") + GOOD[8:],
    "big-endian length": LENGTH.to_bytes(8, "big") + GOOD[8:],
    # other kinds of file
    "pickle": pickle.dumps({KV: [1.0]}),
    "pickle of protocol 0": pickle.dumps({KV: [1.0]}, protocol=0),
    "zip": b"PK\x03\x04" + GOOD,
    "empty zip": b"PK\x05\x06" + b"\0" * 18,
    "gzip": gzip.compress(GOOD, mtime=0),
    "numpy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}" + DATA,
    "html": b"<!doctype html><title>404</title>" * 9,
    "gguf": b"GGUF\x03\0\0\0" + DATA,
    # the header's JSON
    "no JSON": header(b"{" + b"x" * 20),
    "a list": header(b"[]"),
    "a blank first": header(b" " + TEXT),
    "two objects": header(TEXT + b"{}"),
    "bad UTF-8": header(TEXT.replace(b"self.kv", b"self.k\xff")),
    "half a surrogate pair": header(TEXT.replace(b"self.kv", b"\\ud800.kv")),
    "NaN in it": header(TEXT.replace(b'"F32"', b"NaN")),
    "nested deeply": header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "a number of 5,000 digits": header(TEXT.replace(b'"F32"', b"9" * 5000)),
    "the tensor twice": header(TEXT[:-1] + b", " + json.dumps({KV: HEADER[KV]}).encode()[1:]),
    "the metadata twice": header(TEXT[:-1] + b', "__metadata__": {}}'),
    "a key twice in the tensor": header(TEXT.replace(b'"dtype": "F32"', b'"dtype": "F16", "dtype": "F32"')),
    # the metadata
    "metadata no object": metadata(["antefix"]),
    "metadata of numbers": metadata({"antefix": 1}),
    "no metadata": raw({KV: HEADER[KV]}, DATA),
    "metadata of another": metadata({"format": "pt"}),
    "metadata besides": metadata({**HEADER["__metadata__"], "more": "x"}),
    # the declared tensors
    "600 tensors": header(json.dumps({f"t{number}": HEADER[KV] for number in range(600)}).encode()),
    "no tensor": raw({"__metadata__": HEADER["__metadata__"]}),
    "an entry that is a list": raw({**HEADER, KV: [1]}, DATA),
    "no dtype": entry(dtype=None),
    "a field more": entry(strides=[1]),
    "float64": entry(dtype="F64"),
    "int8": entry(dtype="I8"),
    "a dtype that is a number": entry(dtype=4),
    "another dtype's size": entry(dtype="BF16"),
    "a shape that is a number": entry(shape=5),
    "a negative axis": entry(shape=[-1, *SHAPE[1:]]),
    "half an axis": entry(shape=[SHAPE[0] + 0.5, *SHAPE[1:]]),
    "a truth value as an axis": entry(shape=[True, *SHAPE]),
    "an axis of 2^63": entry(shape=[2**63]),
    "a product that wraps to the size": entry(shape=[2**32, 2**32, *SHAPE]),
    "nine axes": entry(shape=[1] * 9),
    "an empty tensor": raw({**HEADER, KV: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
    "three offsets": entry(data_offsets=[0, 4, SIZE]),
    "a negative offset": entry(data_offsets=[-4, SIZE - 4]),
    "offsets that are texts": entry(data_offsets=["0", str(SIZE)]),
    "offsets backwards": entry(data_offsets=[SIZE, 0]),
    "a hole before": raw({**HEADER, KV: {**HEADER[KV], "data_offsets": [4, SIZE + 4]}}, b"\0" * 4 + DATA),
    "two that overlap": raw({**HEADER, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, DATA),
    "a tail": GOOD + b"x",
    "truncated": GOOD[:-1],
    "an offset of 2^70": entry(data_offsets=[0, 2**70]),
    "another name": tensors(weight=random_kv(FROZEN, 4)),
    "one more tensor": tensors(**{KV: random_kv(FROZEN, 4), "x": torch.zeros(1)}),
    "one virtual token more": tensors(**{KV: random_kv(FROZEN, 5)}),
    "axes in another order": tensors(**{KV: random_kv(FROZEN, 4).transpose(2, 3).contiguous()}),
    "a flat tensor": tensors(**{KV: random_kv(FROZEN, 4).flatten()}),
    # the numbers
    "nan": value(float("nan")),
    "infinity": value(float("inf")),
    "minus infinity": value(float("-inf")),
    "enormous": value(1e30),
    # the manifest
    "no manifest": metadata({"antefix": ""}),
    "a manifest that is a list": metadata({"antefix": "[]"}),
    "a manifest with a key twice": metadata({"antefix": json.dumps(MANIFEST)[:-1] + ', "format": 1}'}),
    "format 2": manifest(format=2),
    "format true": manifest(format=True),
    "no format": manifest(format=...),
    "an unknown field": manifest(color="red"),
    "a missing field": manifest(window=...),
    "another method": manifest(method="lora"),
    "a method that is a number": manifest(method=1),
    "the method of another tensor": manifest(method="prompt"),
    "fewer than no tokens": manifest(virtual_tokens=-4),
    "tokens as a text": manifest(virtual_tokens="4"),
    "tokens without end": manifest(virtual_tokens=10**30),
    "no tokens": manifest(virtual_tokens=0, position_offset=0),
    "an offset of its own": manifest(position_offset=1),
    "no geometry": manifest(geometry=None),
    "another geometry": manifest(geometry={**MANIFEST["geometry"], "layers": 99}),
    "a geometry of texts": manifest(geometry=dict.fromkeys(MANIFEST["geometry"], "2")),
    "another base model": manifest(base_digest="0" * 64),
    "a base digest that is none": manifest(base_digest="latest"),
    "an unknown window": manifest(window="sometimes"),
    "a feature map": manifest(feature_map="elu"),
    "keys before their rotation": manifest(query="pre_rope"),
    "a template without a prompt": manifest(template="Q:"),
    "a template with two": manifest(template="{prompt}{prompt}"),
    "a template without end": manifest(template="{prompt}" + "x" * 30_000),
    "no room in the context": long_prefix(),
    # PEFT's
    "an adapter's half a row": save({"prompt_embeddings": torch.zeros(3, 7)}),
    "an adapter without rows": save({"prompt_embeddings": torch.zeros(0, 96)}),
    "an adapter with three axes": save({"prompt_embeddings": torch.zeros(1, 3, 96)}),
}

CRLF = b"\r\n"


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    return f'--B\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + CRLF


ID, FILE, END = part("id", b"x"), part("file", GOOD, "f"), b"--B--\r\n"
FORM = "multipart/form-data; boundary=B"
FORMS: dict[str, tuple[str, bytes]] = {
    "no body": (FORM, b""),
    "no boundary in the type": ("multipart/form-data", ID + FILE + END),
    "another boundary": ("multipart/form-data; boundary=C", ID + FILE + END),
    "a boundary of 1,000 letters": ("multipart/form-data; boundary=" + "B" * 1000, ID + FILE + END),
    "another type": ("application/json", ID + FILE + END),
    "an encoded form": ("application/x-www-form-urlencoded", b"id=x&file=y"),
    "cut off before its end": (FORM, ID + FILE),
    "cut off in the file": (FORM, ID + FILE[:300]),
    "no id": (FORM, FILE + END),
    "no file": (FORM, ID + END),
    "two files": (FORM, ID + FILE + FILE + END),
    "two ids": (FORM, ID + ID + FILE + END),
    "a file that is a text": (FORM, ID + part("file", GOOD) + END),
    "an unknown part": (FORM, ID + part("color", b"red") + FILE + END),
    "a part without a name": (FORM, ID + b"--B\r\n\r\nx\r\n" + FILE + END),
    "a thousand headers": (FORM, ID + b"--B\r\n" + b"X: y\r\n" * 1000 + b"\r\nx\r\n" + END),
    "a header without end": (FORM, ID + b"--B\r\nContent-Disposition: form-data; name=" + b"x" * 100_000 + END),
    "an id of 100 kB": (FORM, part("id", b"x" * 100_000) + FILE + END),
    "an id that is no UTF-8": (FORM, part("id", b"\xff\xfe") + FILE + END),
    "a config that is none": (FORM, ID + part("config", b"[]") + FILE + END),
    "a config of 100 kB": (FORM, ID + part("config", b"[" * 100_000) + FILE + END),
    "metadata that is none": (FORM, ID + part("metadata", b"{") + FILE + END),
    "metadata that is a list": (FORM, ID + part("metadata", b"[]") + FILE + END),
    "metadata of numbers": (FORM, ID + part("metadata", b'{"a": 1}') + FILE + END),
    "metadata with a key twice": (FORM, ID + part("metadata", b'{"a": "1", "a": "2"}') + FILE + END),
    "too much metadata": (FORM, ID + part("metadata", json.dumps(dict.fromkeys(map(str, range(17)), "")).encode())
                          + FILE + END),
    "a long note": (FORM, ID + part("metadata", json.dumps({"a": "x" * 513}).encode()) + FILE + END),
    "half a surrogate pair as a note": (FORM, ID + part("metadata", b'{"a": "\\ud800"}') + FILE + END),
    "a lifetime of nothing": (FORM, ID + part("ttl_seconds", b"0") + FILE + END),
    "a lifetime that is no number": (FORM, ID + part("ttl_seconds", b"nan") + FILE + END),
    "a lifetime of ages": (FORM, ID + part("ttl_seconds", b"9999999999") + FILE + END),
}  # fmt: skip

BAD_IDS = [
    "A", "Support", "a b", " a", "a\n", "a\r\n", "\ta", "a\x00", "a\x7f", ".a", "-a", "_a", "..", "../x", "a/b", "/a",
    "a\\b", "a@1", "a:b", "a*", "{a}", "a%2fb", "a;b", "a?b", "a#b", "é", "ａ", "a\u202e", "\U0001f4a5",
    "x" * 65, "x" * 999, "tiny-llama", "",
]  # fmt: skip


class Watched:
    """A server whose store is to stay as it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.store = Store.open(f"sqlite:///{folder}/store.db")
        loader = PrefixLoader(self.store.prefixes, FROZEN, 1 << 20)
        app = create_app(self.store, FROZEN, FakeLoop(lambda request: [1]), loader)
        self.client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
        assert self.put(GOOD, "sound").status_code == 201
        self._before = self._state()

    def put(self, file: bytes, name: str = "x") -> Response:
        return self.client.put(f"/v1/prefixes/{quote(name, safe='')}/content", content=file)

    def post(self, content_type: str, body: bytes) -> Response:
        return self.client.post("/v1/prefixes", content=body, headers={"content-type": content_type})

    def refused(self, reply: Response) -> str:
        """The code, once everything is as it was."""
        assert 400 <= reply.status_code < 500, reply.text
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert self._state() == self._before
        assert self.client.get("/healthz").status_code == 200
        return str(error["code"])

    def _state(self) -> tuple[str, list[Path]]:
        return fingerprint(self.store), sorted(path for path in (self._folder / "blobs").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    made = Watched(tmp_path_factory.mktemp("malformed"))
    yield made
    assert made.put(GOOD).status_code == 201  # it still takes what is sound
    made.store.close()


def test_the_tables_are_long_enough() -> None:
    assert len(set(FILES.values())) == len(FILES) >= 60
    assert len(FORMS) >= 20
    assert len(set(BAD_IDS)) == len(BAD_IDS) >= 20


@pytest.mark.parametrize("flaw", FILES)
def test_a_malformed_file(watched: Watched, flaw: str) -> None:
    assert watched.refused(watched.put(FILES[flaw])) in ("invalid_prefix", "prefix_mismatch")


@pytest.mark.parametrize("flaw", FORMS)
def test_a_malformed_form(watched: Watched, flaw: str) -> None:
    assert watched.refused(watched.post(*FORMS[flaw])) in ("invalid_request", "invalid_prefix")


@pytest.mark.parametrize("name", BAD_IDS)
def test_a_bad_id(watched: Watched, name: str) -> None:
    assert watched.refused(watched.post(FORM, part("id", name.encode()) + FILE + END)) == "invalid_name"
    assert watched.refused(watched.put(GOOD, name)) in ("invalid_name", "route_not_found", "method_not_allowed")


@pytest.mark.anyio
async def test_2000_flipped_bits(watched: Watched) -> None:
    """Each is refused with a reason, or makes another sound file, whose digest is then another.

    Nearly all of the latter are in the tensor's numbers; in the manifest there is one such bit, in `position_offset`,
    which may be 4 or 0. With the digest of what was meant, every one is refused.
    """
    rng = random.Random(20)
    found: Counter[str] = Counter()
    transport = ASGITransport(app=watched.client.app)
    async with AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        for _ in range(FLIPS):
            in_tensor = rng.random() < 0.2  # the header is where it is dangerous
            position = rng.randrange(8 + LENGTH, len(GOOD)) if in_tensor else rng.randrange(8 + LENGTH)
            flipped = bytearray(GOOD)
            flipped[position] ^= 1 << rng.randrange(8)
            where = f"{'tensor' if in_tensor else 'header'}"
            found[f"{await _outcome(client, bytes(flipped))} in the {where}"] += 1
    assert found.total() == FLIPS
    assert 0 < found["stored in the header"] < FLIPS / 1000
    assert min(found[f"{outcome} in the tensor"] for outcome in ("stored", "refused")) > FLIPS / 200


async def _outcome(client: AsyncClient, flipped: bytes) -> str:
    reply = await client.put("/v1/prefixes/flipped/content", content=flipped)
    if reply.status_code == 400:
        assert reply.json()["error"]["message"]
        return "refused"
    assert reply.status_code == 201, reply.text
    assert reply.json()["digest"] == codec.digest_of(flipped) != codec.digest_of(GOOD)
    said = {"x-content-sha256": codec.digest_of(GOOD)}
    assert (await client.put("/v1/prefixes/flipped/content", content=flipped, headers=said)).status_code == 400
    return "stored"
