import os
from pathlib import Path

import pytest

from prefix_store.jobs import BUILT_IN_METHODS
from server import settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ANTEFIX_")]:
        monkeypatch.delenv(name)


def test_defaults_need_no_environment() -> None:
    read = settings.read()
    assert (read.host, read.port, read.model, read.require_prefix) == ("127.0.0.1", 8000, None, False)
    assert read.is_loopback


def test_every_field_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PORT": "9", "MODEL": "m", "REQUIRE_PREFIX": "1", "KV_SLOTS": "77", "BLOBS": ""}.items():
        monkeypatch.setenv(f"ANTEFIX_{name}", value)
    read = settings.read()
    assert (read.port, read.model, read.require_prefix, read.kv_slots, read.blobs) == (9, "m", True, 77, None)


def test_the_stores_address_may_lie_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "address").write_text("redis://:secret@redis:6379/0\n")
    monkeypatch.setenv("ANTEFIX_STORE", "sqlite:///passed/over.db")
    monkeypatch.setenv("ANTEFIX_STORE_FILE", str(tmp_path / "address"))
    assert settings.read().store == "redis://:secret@redis:6379/0"
    assert "secret" not in repr(settings.read())


def test_the_names_of_a_workers_own_methods_are_taken_from_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.read().method_names == BUILT_IN_METHODS
    monkeypatch.setenv("ANTEFIX_METHODS", "/absent/low_rank.py,mine.py")
    assert settings.read().method_names == (*BUILT_IN_METHODS, "low_rank", "mine")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("METHODS", "low-rank.py"),
        ("METHODS", "a/prefix.py"),
        ("STORE_FILE", "/absent"),
        ("PORT", "x"),
        ("PORT", "70000"),
        ("DTYPE", "int4"),
        ("DEVICE", "tpu"),
        ("MAX_BATCH", "0"),
        ("REQUIRE_PREFIX", "?"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"ANTEFIX_{name}", value)
    with pytest.raises(SystemExit) as caught:
        settings.read()
    message = str(caught.value)
    assert f"ANTEFIX_{name}='{value}'" in message
    assert "\n" not in message


def test_an_unknown_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTEFIX_MODLE", "x")
    with pytest.raises(SystemExit, match="ANTEFIX_MODLE is not a setting; did you mean ANTEFIX_MODEL"):
        settings.read()


def test_one_that_is_near_to_none_gets_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTEFIX_COLOUR", "x")
    with pytest.raises(SystemExit, match=r"^antefix: ANTEFIX_COLOUR is not a setting$"):
        settings.read()


def test_variables_of_the_other_processes_are_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.ELSEWHERE:
        monkeypatch.setenv(name, "1")
    settings.read()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("example.org", False)],
)  # fmt: skip
def test_only_loopback_addresses_count_as_loopback(host: str, loopback: bool) -> None:
    assert settings.Settings(host=host).is_loopback is loopback


def test_a_server_at_another_address_has_all_else_as_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTEFIX_PORT", "8000")
    monkeypatch.setenv("ANTEFIX_MAX_BATCH", "3")
    found = settings.environment_at("10.0.0.7", 41)
    assert (found["ANTEFIX_HOST"], found["ANTEFIX_PORT"], found["ANTEFIX_MAX_BATCH"]) == ("10.0.0.7", "41", "3")
