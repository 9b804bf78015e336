"""`antefix inspect`: a table to read, or the server's reply."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.prefix_store.cli.conftest import HOSTILE, SPELT, Antefix, Instead, Running
from tests.server import artefacts


@pytest.fixture
def pushed(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    for name, content in {
        "seen": artefacts.native(running.frozen, 3, seed=1),
        "memory": artefacts.memory(running.frozen),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert antefix("prefix", "push", name, tmp_path / name).exit_code == 0


@pytest.mark.usefixtures("pushed")
def test_a_prefix_with_and_without_a_prompt(antefix: Antefix) -> None:
    bare = antefix("inspect", "seen")
    assert bare.exit_code == 0, bare.stderr
    assert bare.stdout.startswith("seen@1  prefix, 3 virtual tokens, ")
    assert "no importance: give a prompt to measure it on" in bare.stdout
    told = antefix("inspect", "seen", "--prompt", "The old man", "--prompt", "Two").stdout
    lines = told.splitlines()
    tokens = lines[lines.index("") + 1 :][:4]
    assert tokens[0].split() == ["token", "share", "importance", "rank", "nearest", "words"]
    assert sorted(line.split()[3] for line in tokens[1:]) == ["1", "2", "3"]
    assert all("%" in line and ("+" in line or "-" in line) for line in tokens[1:])
    assert len([line for line in lines if line.endswith("%")]) == 3  # a line for each layer
    assert "no " not in told


@pytest.mark.usefixtures("pushed")
def test_a_memory_has_a_norm_for_each_head(antefix: Antefix) -> None:
    told = antefix("inspect", "memory").stdout
    assert "norm of each head's memory" in told
    assert "no attention: a memory of prefix_plus stands beside the softmax" in told


@pytest.mark.usefixtures("pushed")
def test_json_is_the_whole_reply(antefix: Antefix) -> None:
    found = json.loads(antefix("inspect", "seen", "--json").stdout)
    assert found["object"] == "prefix.inspection"
    assert len(found["tokens"][0]["nearest"]) == 5


def test_a_prefix_that_is_not_there(antefix: Antefix) -> None:
    result = antefix("inspect", "nobody")
    assert (result.exit_code, result.stderr) == (1, "antefix: there is no prefix 'nobody'\n")


def reply(**changes: Any) -> dict[str, Any]:
    near = {"token": "the", "token_id": 5, "score": 0.5}
    token = {"index": 0, "nearest": [near], "share": None, "importance": None, "rank": None}
    found = {
        "id": "x",
        "version": 1,
        "digest": "d" * 64,
        "method": "prefix",
        "virtual_tokens": 1,
        "tokens": [token],
        "layers": [{"layer": 0, "key_norms": [1.0], "value_norms": [2.0]}],
        "attention": None,
        "absent": {},
        "computed_with": "weights",
    }
    return found | changes


def test_what_a_server_sends_is_spelt_out(antefix: Antefix, instead: Instead) -> None:
    instead(lambda request: httpx.Response(200, json=reply(computed_with=HOSTILE)))
    result = antefix("inspect", "x")
    assert result.exit_code == 0, result.stderr
    assert SPELT in result.stdout


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 3},
        {"layers": [{}]},
        {"layers": [{"layer": 0, "key_norms": [], "value_norms": []}]},
        {"tokens": [{"index": 0}]},
        {"digest": None},
        {"absent": []},
    ],
)
def test_another_kind_of_server_is_named(antefix: Antefix, instead: Instead, change: dict[str, Any]) -> None:
    instead(lambda request: httpx.Response(200, json=reply(**change)))
    result = antefix("inspect", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("antefix: the server does not answer as an antefix server")
