from pathlib import Path

import pytest

from prefix_store import secret_file


def test_a_secret_comes_without_the_line_s_end(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("redis://:word@host/0\n")
    assert secret_file.read(str(tmp_path / "secret")) == "redis://:word@host/0"


@pytest.mark.parametrize("content", [b"", b" \n", b"x" * 5000, "schlüssel".encode()])
def test_what_cannot_be_a_secret_is_refused_and_not_repeated(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(ValueError, match=r"^the file must hold one line of plain characters$"):
        secret_file.read(str(tmp_path / "secret"))


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match=r"^the file cannot be read: \w"):
            secret_file.read(str(path))
