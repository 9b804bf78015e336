from __future__ import annotations

import sys

import pytest

from trainer.methods import files

SOUND = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Mine:
    frozen: object
    spec: object
    text: object

METHOD = Mine
"""


def test_a_files_method_is_taken_under_the_files_name(tmp_path):
    (tmp_path / "json.py").write_text(SOUND)
    taken = files.load({"json": tmp_path / "json.py"})
    assert list(taken) == ["json"]
    made = taken["json"]("model", "spec", [1])
    assert (made.frozen, made.spec, made.text) == ("model", "spec", [1])
    assert sys.modules["json"].loads("1") == 1, "everybody else's json is still theirs"


def test_no_files_are_no_methods():
    assert files.load({}) == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no such file"),
        ("METHODS = 3", "it has no METHOD, or one that cannot be called"),
        ("METHOD = 3", "it has no METHOD, or one that cannot be called"),
        ("import absent_module", "ModuleNotFoundError: No module named 'absent_module'"),
        ("METHOD = (", "SyntaxError: '(' was never closed (mine.py, line 1)"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason_in_one_line(tmp_path, text, reason):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        files.load({"mine": path})
    assert str(caught.value) == f"antefix worker: ANTEFIX_METHODS: {path}: {reason}"
