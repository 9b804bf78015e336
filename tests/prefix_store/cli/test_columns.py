import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from prefix_store.cli import columns
from prefix_store.cli.columns import Column

WORDS = "the king said 你好 to everybody " * 200


def lines(*shown: Column, width: int, height: int | None = None) -> list[str]:
    """The board as a terminal of this size gets it."""
    console = Console(file=io.StringIO(), width=width, height=50, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(columns.board(shown, console, height))
    return captured.get().splitlines()


def closing(version: int | None, tokens: int) -> dict[str, object]:
    prefix = None if version is None else {"id": "a", "version": version}
    return {"text": "", "finish_reason": "stop", "prefix": prefix, "usage": {"completion_tokens": tokens}}


def test_a_column_fills_and_ends() -> None:
    column = Column("plays@best")
    assert (column.title, column.figures) == ("plays@best", "waiting")
    for now in (1.0, 2.0, 3.0):
        column.take({"text": "x", "finish_reason": None}, now)
    assert (column.text, column.figures) == ("xxx", "1 tokens/s")
    column.take(closing(3, 9), 5.0)
    assert (column.title, column.figures) == ("plays@3", "2 tokens/s  stop")
    column.error = "broke"
    assert column.figures == "2 tokens/s  error"


def test_a_text_that_is_empty_has_no_speed() -> None:
    column = Column(None)
    column.take(closing(None, 1), 1.0)
    assert (column.title, column.figures) == ("(no prefix)", "stop")


def test_the_total_is_of_all_tokens_over_all_the_time() -> None:
    shown = [Column("a", tokens=6, first_at=1.0, last_at=2.0), Column("b", tokens=5, first_at=1.5, last_at=3.0)]
    assert columns.total(shown) == "all together: 11 tokens  5 tokens/s"
    assert columns.total([Column("a"), Column("b")]) == "all together: 0 tokens"


@pytest.mark.parametrize(("width", "rows"), [(200, 1), (80, 2), (50, 3), (30, 5), (10, 5)])
def test_columns_wrap_to_rows_where_it_is_narrow(width: int, rows: int) -> None:
    shown = lines(*(Column(f"p{index}", text=WORDS) for index in range(5)), width=width)
    assert all(cell_len(line) <= width for line in shown)
    assert sum("p" in line for line in shown) == rows
    if rows < 5:
        assert all(len(part) >= columns.NARROWEST for line in shown if "─" in line for part in line.split())


@pytest.mark.parametrize("height", [6, 10, 24])
@pytest.mark.parametrize("width", [30, 60, 120])
def test_while_it_lives_it_stays_within_the_terminal(width: int, height: int) -> None:
    """A frame higher than the terminal could not be drawn over, and every one would stay on it."""
    shown = [Column("p" * 64, text=WORDS + "the end"), Column("b", error="no " * 100), Column("c", text="\n" * 500)]
    board = lines(*shown, width=width, height=height)
    assert len(board) <= height
    assert all(cell_len(line) <= width for line in board)
    assert any("the end" in line for line in board)
    assert len(lines(*shown, width=width)) > 100


def test_what_a_prefix_writes_is_shown_as_it_is() -> None:
    shown = "\n".join(lines(Column("a", text="[red]x[/red] \x1b[31my :smile:", error="[b]\x07"), width=60))
    assert "[red]x[/red] \\x1b[31my :smile:" in shown
    assert "[b]\\x07" in shown
