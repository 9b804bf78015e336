import io
import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save

from prefix_store.errors import InvalidPrefix
from prefix_store.safetensors_file import MAX_HEADER, MAX_TENSORS, read_header, read_tensors, strict_json
from tests.prefix_store.samples import raw


def f32(*shape, begin=0, end):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def zipped():
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    assert zipfile.is_zipfile(buffer)
    return buffer.getvalue()


ONE = {"a": f32(2, end=8)}
MANY = {f"t{index}": f32(0, end=0) for index in range(MAX_TENSORS + 1)}
HOSTILE = {
    "empty": (b"", "at least 8 bytes, got 0"),
    "seven bytes": (b"\0" * 7, "at least 8 bytes"),
    "header over the cap": (raw(b"{" + b" " * MAX_HEADER + b"}"), "header of at most"),
    "header of 2**64 - 1 bytes": (b"\xff" * 8 + b"{}", "header of at most"),
    "header past the end": (raw(ONE, b"\0" * 8)[:20], "truncated"),
    "data past the end": (raw(ONE, b"\0" * 7), "end at byte 8, the file at byte 7"),
    "tail": (raw(ONE, b"\0" * 9), "end at byte 8, the file at byte 9"),
    "pickle": (pickle.dumps({"a": 1}), "pickle and zip files are refused"),
    "old pickle": (pickle.dumps({"a": 1}, protocol=2), "pickle and zip files are refused"),
    "torch archive": (zipped(), "pickle and zip files are refused"),
    "no header": (raw(b""), "expected a JSON object"),
    "not JSON": (raw(b"{nonsense}"), "not valid JSON"),
    "leading blank": (raw(b" {}"), "expected a JSON object"),
    "a list": (raw(b"[]"), "expected a JSON object"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (raw("{}".encode("utf-16-le")), "not valid JSON"),
    "lone surrogate": (raw({"\ud800": f32(0, end=0)}), "surrogates"),
    "not a number": (raw(b'{"a": NaN}'), "NaN is not JSON"),
    "a number of 5000 digits": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "nested too deeply": (raw(b'{"a":' + b"[" * 40_000 + b"]" * 40_000 + b"}"), "nested too deeply"),
    "a tensor twice": (raw(b'{"a": 1, "a": 1}'), "stands twice"),
    "an inner key twice": (raw(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "stands twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata as a list": (raw({"__metadata__": ["a"]}), "__metadata__"),
    "too many tensors": (raw(MANY), "at most 512 tensors, got 513"),
    "entry is a number": (raw({"a": 1}), "expected an object of dtype"),
    "entry with more keys": (raw({"a": {**f32(0, end=0), "x": 1}}), "expected an object of dtype"),
    "float64": (raw({"a": {**f32(1, end=8), "dtype": "F64"}}, b"\0" * 8), "expected dtype F32, F16, BF16, got 'F64'"),
    "dtype is a list": (raw({"a": {**f32(1, end=4), "dtype": []}}, b"\0" * 4), "expected dtype"),
    "negative axis": (raw({"a": f32(-1, end=4)}, b"\0" * 4), "natural numbers"),
    "axis is true": (raw({"a": f32(True, end=4)}, b"\0" * 4), "natural numbers"),
    "axis is a float": (raw({"a": f32(1.0, end=4)}, b"\0" * 4), "natural numbers"),
    "an axis that overflows": (raw({"a": f32(2**62, 4, end=0)}), "sane size"),
    "nine axes": (raw({"a": f32(*[1] * 9, end=4)}, b"\0" * 4), "at most 8"),
    "shape is a number": (raw({"a": {**f32(end=4), "shape": 1}}, b"\0" * 4), "natural numbers"),
    "three offsets": (raw({"a": {**f32(1, end=4), "data_offsets": [0, 4, 4]}}, b"\0" * 4), "data_offsets"),
    "negative offset": (raw({"a": f32(1, begin=-4, end=0)}), "data_offsets"),
    "offsets backwards": (raw({"a": f32(1, begin=4, end=0)}, b"\0" * 4), "expected 4 bytes"),
    "shape over its bytes": (raw({"a": f32(2, end=4)}, b"\0" * 4), "expected 8 bytes for F32 \\[2\\], got 4"),
    "overlap": (raw({"a": f32(1, end=4), "b": f32(1, begin=0, end=4)}, b"\0" * 4), "offset 4, got one at 0"),
    "hole in front": (raw({"a": f32(1, begin=4, end=8)}, b"\0" * 8), "offset 0, got one at 4"),
    "hole between": (raw({"a": f32(1, end=4), "b": f32(1, begin=8, end=12)}, b"\0" * 12), "offset 4, got one at 8"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InvalidPrefix, match=message) as caught:
        read_header(path)
    assert len(caught.value.message) < 400


def test_a_sound_header(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(save({"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.float16)}, {"format": "pt"}))
    header = read_header(path)
    assert header.shapes == {"a": (2, 3), "b": (1,)}
    assert header.metadata == {"format": "pt"}


def test_reading_refuses_what_the_library_refuses(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\0" * 100)
    with pytest.raises(InvalidPrefix, match="not a safetensors file"):
        read_tensors(path)


def test_tensors_outlive_their_file(tmp_path):
    path = tmp_path / "file"
    values = torch.arange(300_000, dtype=torch.float32)
    path.write_bytes(save({"a": values}))
    tensors = read_tensors(path)
    path.write_bytes(b"")  # a mapped tensor would now end the process
    assert torch.equal(tensors["a"], values)


@pytest.mark.parametrize("blanks", range(8))
def test_unaligned_data_is_read_right(tmp_path, blanks):
    path = tmp_path / "file"
    values = torch.tensor([1.5, -2.5])
    path.write_bytes(raw(json.dumps(ONE).encode() + b" " * blanks, values.numpy().tobytes()))
    assert read_header(path).shapes == {"a": (2,)}
    assert torch.equal(read_tensors(path)["a"], values)


def test_strict_json_reads_plain_json():
    assert strict_json('{"a": {"b": [1, "ü"]}}', "test") == {"a": {"b": [1, "ü"]}}
