import re
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from prefix_store import cli
from prefix_store.cli import build
from prefix_store.cli.app import ORDER
from tests.prefix_store.cli.conftest import Antefix


@pytest.mark.parametrize("command", [[], *([name] for name in ORDER)])
def test_every_command_explains_itself(antefix: Antefix, command: list[str]) -> None:
    result = antefix(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_help_begins_with_examples_and_lists_every_command_as_a_newcomer_meets_them(antefix: Antefix) -> None:
    shown = antefix("--help").stdout
    examples, _, commands = shown.partition("Commands")
    assert 'antefix compare "Once upon a time" --prefix plays,carroll --bare' in examples
    assert tuple(re.findall(r"^│ (\w+) ", commands, re.MULTILINE)) == ORDER
    assert set(ORDER) == {*(command.name or command.callback.__name__ for command in build().registered_commands)} | {
        group.name for group in build().registered_groups
    }


def test_help_does_not_load_torch_or_the_server() -> None:
    code = (
        "import sys, prefix_store.cli as cli; cli.build(); "
        "sys.exit(bool({'torch', 'transformers', 'server', 'trainer', 'fastapi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_letter_that_the_terminal_lacks_and_an_early_ctrl_c_are_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        print("näh", flush=True)
        raise KeyboardInterrupt

    written = BytesIO()
    monkeypatch.setattr(cli, "build", lambda: run)
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert (caught.value.code, written.getvalue()) == (130, b"n?h\n")


def test_ctrl_c_while_the_commands_are_loaded_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from prefix_store.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "train"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
