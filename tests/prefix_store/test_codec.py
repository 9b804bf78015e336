import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from prefix_store.codec import decode, digest_of, encode, write
from prefix_store.errors import InvalidPrefix, StoreUnavailable
from prefix_store.prefix import Method, Window
from tests.prefix_store.samples import GEOMETRY, manifest, raw, tensors

FORMAT1 = Path(__file__).parent / "fixtures" / "format1.safetensors"
FORMAT1_DIGEST = "0ed72d1ac2b90b1540bf30bd3872014a34d4d1ccab7f69ff782e1afa5730b945"
SHAPE = [2, 2, 2, 5, 3]
BYTES = 4 * 2 * 2 * 2 * 5 * 3


def native(change=(), **entry):
    """A native file with changes to its manifest and to its one tensor's entry."""
    text = json.dumps({**manifest().to_json(), **dict(change)})
    declared = {"dtype": "F32", "shape": SHAPE, "data_offsets": [0, BYTES], **entry}
    return raw({"__metadata__": {"antefix": text}, "self.kv": declared}, b"\0" * declared["data_offsets"][1])


def with_metadata(metadata):
    return save(tensors(manifest()), metadata)


def with_manifest(text):
    return with_metadata({"antefix": text})


def spoiled(value):
    spoilt = tensors(manifest())
    spoilt["self.kv"][1, 1, 1, 4, 2] = value
    return save(spoilt, {"antefix": json.dumps(manifest().to_json())})


TWICE = json.dumps(manifest().to_json())[:-1] + ', "window": "slides"}'
HOSTILE = {
    "no metadata": (save(tensors(manifest())), "single key 'antefix', got \\[\\]"),
    "foreign metadata": (with_metadata({"format": "pt"}), "got \\['format'\\]"),
    "more metadata": (with_metadata({"antefix": "{}", "note": ""}), "single key"),
    "manifest is not JSON": (with_manifest("hello"), "manifest: not valid JSON"),
    "manifest is a list": (with_manifest("[]"), "manifest: expected a JSON object"),
    "manifest key twice": (with_manifest(TWICE), "stands twice"),
    "manifest nested too deeply": (with_manifest('{"a":' + "[" * 40_000), "nested too deeply"),
    "manifest with a lone surrogate": (with_manifest('{"format": "\\ud800"}'), "surrogates"),
    "newer format": (native({"format": 2}), "format must be 1"),
    "unknown field": (native({"x": 1}), "unknown"),
    "another tensor": (native({"method": "prompt"}), "expected the tensor 'embeds', got \\['self.kv'\\]"),
    "fewer virtual tokens": (native({"virtual_tokens": 4, "position_offset": 4}), "expected shape \\[2, 2, 2, 4, 3\\]"),
    "another geometry": (
        native({"geometry": {**GEOMETRY.to_json(), "layers": 3}}),
        "expected shape \\[3, 2, 2, 5, 3\\]",
    ),
    "axes swapped": (native(shape=[2, 2, 2, 3, 5]), "got \\[2, 2, 2, 3, 5\\]"),
    "half the bytes": (native(data_offsets=[0, BYTES // 2]), "expected 480 bytes"),
    "integers": (native(dtype="I32"), "expected dtype"),
    "NaN": (spoiled(torch.nan), "finite"),
    "infinity": (spoiled(-torch.inf), "finite"),
    "far too large": (spoiled(3e38), "at most 1e\\+06"),
    "truncated": (encode(manifest(), tensors(manifest()))[:-1], "the file at byte"),
    "tail": (encode(manifest(), tensors(manifest())) + b"\0", "the file at byte"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InvalidPrefix, match=message):
        decode(path)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_keeps_every_bit(tmp_path, method, dtype):
    written = manifest(method, base_digest="a" * 64, window=Window.SLIDES, template="Säg: {prompt}\n\U0001f600")
    values = tensors(written, dtype=dtype)
    path = tmp_path / "file"
    path.write_bytes(encode(written, values))
    read, back = decode(path)
    assert read == written
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in back.items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in values.items()
    }


def test_equal_content_gives_equal_bytes():
    strided = {"self.kv": tensors(manifest())["self.kv"].mT.contiguous().mT.requires_grad_()}
    assert not strided["self.kv"].is_contiguous()
    assert encode(manifest(), strided) == encode(manifest(), tensors(manifest()))
    assert encode(manifest(), tensors(manifest(), seed=1)) != encode(manifest(), tensors(manifest()))
    assert encode(manifest(window=Window.SLIDES), tensors(manifest())) != encode(manifest(), tensors(manifest()))


def test_the_header_is_compact_sorted_json():
    data = encode(manifest(), tensors(manifest()))
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    expected = json.dumps(manifest().to_json(), sort_keys=True, separators=(",", ":"))
    assert metadata == {"antefix": expected}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (manifest(position_offset=1), "position_offset"),
        (manifest(template="\ud800{prompt}"), "surrogates"),
        (manifest(template="\x01" * 19_000 + "{prompt}"), "at most 100000 bytes"),
        (manifest(geometry=dataclasses.replace(GEOMETRY, layers=3)), "expected shape"),
    ],
)
def test_encode_refuses_what_decode_would(bad, message):
    with pytest.raises(InvalidPrefix, match=message):
        encode(bad, tensors(manifest()))


def test_the_longest_template_fits(tmp_path):
    written = manifest(template="\U0001f600" * 19_992 + "{prompt}")
    path = tmp_path / "file"
    path.write_bytes(encode(written, tensors(written)))
    assert decode(path)[0] == written


def test_a_file_of_format_1_opens_for_ever():
    assert digest_of(FORMAT1) == FORMAT1_DIGEST
    read, values = decode(FORMAT1)
    assert read == manifest(base_digest="0123456789abcdef" * 4, template="Question: {prompt}\nAnswer:")
    assert torch.equal(values["self.kv"], torch.arange(120, dtype=torch.bfloat16).reshape(SHAPE) / 8)
    assert encode(read, values) == FORMAT1.read_bytes()


def test_digest_of_bytes_and_of_their_file_are_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert digest_of(path) == digest_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_whole(tmp_path_factory, data):
    content = bytearray(FORMAT1.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        read, values = decode(path)
    except InvalidPrefix:
        return
    assert encode(read, values)


@pytest.mark.parametrize("method", Method)
def test_a_file_is_written_as_it_is_encoded(method, tmp_path):
    made = manifest(method, template="é {prompt}")
    values = tensors(made)
    write(made, values, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == encode(made, values)


def test_nothing_unsound_is_written(tmp_path):
    with pytest.raises(InvalidPrefix):
        write(manifest(), {"self.kv": torch.full(SHAPE, torch.nan)}, tmp_path / "file")
    with pytest.raises(InvalidPrefix, match="at most 100000 bytes"):
        write(manifest(template="{prompt}" + "\0" * 19_000), tensors(manifest()), tmp_path / "file")


def test_a_disk_that_fails_is_the_stores_failure(tmp_path):
    with pytest.raises(StoreUnavailable, match=r"cannot be written: .*No such file"):
        write(manifest(), tensors(manifest()), tmp_path / "gone" / "file")
