import io
import sys
import time

import pytest

from prefix_store.cli import terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen_as_stderr(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """No fixture: between a fixture and its test pytest puts its own stderr back."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    return screen


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Hällo\t你好 [red]👩‍👩‍👧\n", "Hällo\t你好 [red]👩‍👩‍👧\n"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("a\r\nb\rc\x08\x7f\x9b2J", "a\nb\\rc\\x08\\x7f\\x9b2J"),
        ("\u202eabc\u2066\u2028\ud800", "\\u202eabc\\u2066\\u2028\\ud800"),
        ("a\u200eb\u200fc\u061c", "a\\u200eb\\u200fc\\u061c"),
    ],
)
def test_control_characters_are_spelt_out_and_nothing_else(text: str, shown: str) -> None:
    assert terminal.printable(text) == shown


def test_clock() -> None:
    assert [terminal.clock(seconds) for seconds in (0, 9.6, 61, 3599, 3600)] == [
        "0:00",
        "0:10",
        "1:01",
        "59:59",
        "1:00:00",
    ]


def test_a_dumb_terminal_is_written_to_as_a_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_as_stderr(monkeypatch)
    assert terminal.is_live(screen)
    assert not terminal.is_live(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.is_live(screen)


def test_a_transfer_has_a_bar_once_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_as_stderr(monkeypatch)
    monkeypatch.setattr(terminal, "BAR_AFTER_SECONDS", 0.01)
    with terminal.transfer("sending", 2_000_000) as tell:
        tell(1_000_000)
        time.sleep(0.2)
    assert "sending" in screen.getvalue()
    assert "1.0/2.0 MB" in screen.getvalue()


def test_a_short_transfer_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_as_stderr(monkeypatch)
    with terminal.transfer("sending", 10) as tell:
        tell(10)
    assert screen.getvalue() == ""


def test_without_a_terminal_a_transfer_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "BAR_AFTER_SECONDS", 0)
    with terminal.transfer("sending", 10) as tell:
        tell(10)
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
