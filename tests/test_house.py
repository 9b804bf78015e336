"""Rules of the house that no linter knows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from transformers import AttentionMaskInterface

from server.engine import attention

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "prefix_store", "trainer")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TOP_LEVEL = {
    *PACKAGES,
    *("tests", "docker", "docker-compose.yml", "pyproject.toml", "README.md"),
    *("docs", "LICENSE", "CHANGELOG.md", "SECURITY.md", "Makefile", "constraints.txt"),
}
UNPICKLING = re.compile(
    r"(import|from) (pickle|marshal|shelve|dill|joblib)\b|torch\.load|(numpy|np)\.load|allow_pickle|weights_only=False"
)
UNPICKLER = "prefix_store/formats/pickled.py"
# Who may look at the environment: each process's settings, and the command line, which is the client's side.
ENVIRONMENT_READERS = re.compile(r"(server|trainer)/settings\.py|prefix_store/cli/.*")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_top_level_holds_what_it_should():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git work tree")
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert {entry for entry in top if not entry.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_is_small_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert text.startswith('"""')


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_is_unpickled_but_by_one_module(path):
    assert bool(UNPICKLING.search(path.read_text())) == (name(path) == UNPICKLER)


def test_what_is_unpickled_holds_tensors_alone():
    text = (ROOT / UNPICKLER).read_text()
    assert text.count("torch.load(") == text.count("weights_only=True") == 1
    assert set(re.findall(r"^(?:from pickle.*|import pickle.*)$", text, re.MULTILINE)) == {
        "from pickle import UnpicklingError"
    }


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_the_environment_is_read_in_one_place_a_process(path):
    if not ENVIRONMENT_READERS.fullmatch(name(path)):
        assert not re.search(r"os\.environ|getenv", path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_there_is_no_module_level_state(path):
    assert not re.search(r"^\s*global ", path.read_text(), re.MULTILINE)


def test_transformers_builds_no_mask_for_the_engine():
    """A registered mask function would make an O(T²) mask over rows that have nothing to do with one another."""
    assert attention.NAME not in AttentionMaskInterface().valid_keys()
