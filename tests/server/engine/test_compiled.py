import pytest

from server.engine import compiled, int8_rows


def test_a_broken_compiler_leaves_nothing_behind(monkeypatch, tmp_path):
    (tmp_path / "cc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiled, "_cache", lambda: tmp_path / "cache")
    assert compiled.library("broken", int8_rows.SOURCES) is None
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_compiled_once_is_kept(monkeypatch, tmp_path):
    source = tmp_path / "seven.c"
    source.write_text("int seven(void) { return 7; }")
    monkeypatch.setattr(compiled, "_cache", lambda: tmp_path / "cache")
    made = compiled.library("seven", [source])
    if made is None:
        pytest.skip("no C compiler")
    assert made.seven() == 7
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    assert compiled.library("seven", [source]).seven() == 7
    assert kept.stat().st_mtime_ns == before
    source.write_text("int seven(void) { return 8; }")
    assert compiled.library("seven", [source]).seven() == 8


def test_what_was_compiled_before_needs_no_compiler(monkeypatch, tmp_path):
    """As in an image: compiled where it is built, used where there is none."""
    source = tmp_path / "seven.c"
    source.write_text("int seven(void) { return 7; }")
    monkeypatch.setattr(compiled, "_cache", lambda: tmp_path / "cache")
    if compiled.library("seven", [source]) is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled.library("seven", [source]).seven() == 7
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    assert compiled.library("seven", [source]) is None, "it may have instructions that this one lacks"


def test_what_cannot_be_loaded_is_none(monkeypatch, tmp_path):
    source = tmp_path / "seven.c"
    source.write_text("int seven(void) { return 7; }")
    monkeypatch.setattr(compiled, "_cache", lambda: tmp_path / "cache")
    path = compiled._compiled("seven", [source])
    if path is None:
        pytest.skip("no C compiler")
    path.write_bytes(b"not a library")
    assert compiled.library("seven", [source]) is None
