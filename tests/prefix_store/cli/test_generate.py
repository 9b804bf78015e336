from pathlib import Path

import httpx
import pytest

from prefix_store.errors import GenerationFailed
from tests.prefix_store.cli.conftest import ANSWER, Antefix, Instead, Running
from tests.server import artefacts


def test_text_is_printed_as_it_comes(antefix: Antefix) -> None:
    result = antefix("generate", "hi")
    assert (result.exit_code, result.stdout) == (0, f"{ANSWER}\n")


def test_options_reach_the_server(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(artefacts.native(running.frozen))
    antefix("prefix", "push", "support", tmp_path / "f")
    antefix("generate", "hi", "--prefix", "support", "--max-tokens", "3", "--temperature", "0", "--seed", "7")
    request = running.loop.requests[-1]
    assert request.prefix is not None
    assert (request.params.max_tokens, request.params.is_greedy, request.params.seed) == (3, True, 7)
    assert antefix("generate", "hi", "--stop", "lo").stdout == "Häl\n"
    antefix("generate", "hi", "--num-beams", "4", "--length-penalty", "0.5")
    params = running.loop.requests[-1].params
    assert (params.num_beams, params.length_penalty) == (4, 0.5)


def test_an_unknown_prefix_is_an_error(antefix: Antefix) -> None:
    result = antefix("generate", "hi", "--prefix", "nothing")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no prefix 'nothing'" in result.stderr


def test_an_error_in_mid_text_begins_a_line(
    antefix: Antefix, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.loop, "failure", GenerationFailed("the device is gone"))
    result = antefix("generate", "hi")
    assert (result.exit_code, result.stdout) == (1, f"{ANSWER}\n")
    assert result.stderr == "antefix: the device is gone\n"


def test_an_answer_that_does_not_finish_is_an_error(antefix: Antefix, instead: Instead) -> None:
    text = 'data: {"text": "a", "finish_reason": null}\n\ndata: [DONE]\n\n'
    instead(lambda request: httpx.Response(200, text=text))
    result = antefix("generate", "hi")
    assert (result.exit_code, result.stdout) == (1, "a\n")
    assert "the answer ended before its end" in result.stderr
