import subprocess
import sys

import pytest

from tests.prefix_store.cli.conftest import Antefix


@pytest.mark.parametrize("command", [[], ["serve"], ["train"], ["generate"], ["jobs"], ["prefix"], ["key"], ["worker"]])
def test_every_command_explains_itself(antefix: Antefix, command: list[str]) -> None:
    result = antefix(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_help_does_not_load_torch_or_the_server() -> None:
    code = (
        "import sys, prefix_store.cli as cli; cli.build(); "
        "sys.exit(bool({'torch', 'transformers', 'server', 'trainer', 'fastapi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
