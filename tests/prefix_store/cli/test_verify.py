"""`antefix verify`: a line for each check, PASS or FAIL, and an exit status to go by."""

from typing import Any

import httpx
import pytest

from tests.prefix_store.cli.conftest import HOSTILE, SPELT, Antefix, Instead


def reply(**changes: Any) -> dict[str, Any]:
    check = {"ok": True, "tokens_differ": 0, "near_ties": 0, "max_logprob_difference": 1e-6, "tolerance": 1e-3}
    found = {
        "ok": True,
        "prefix": {"id": "x", "version": 2, "digest": "d" * 64},
        "checks": [check | {"name": "alone, as plain transformers"}],
        "controls": [
            {"name": "without the prefix", "ok": True, "mean_logprob_difference": 1.5, "at_least": 1e-5},
        ],
        "rows_beside": 9,
        "neighbours": ["y@1"],
        "prompts": 4,
        "tokens": 48,
        "reference": "transformers",
        "computed_with": "the float32 weights as they were loaded",
    }
    return found | changes


def test_pass(antefix: Antefix, instead: Instead) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, request.url.path))
        return httpx.Response(200, json=reply())

    instead(answer)
    result = antefix("verify", "x")
    assert result.exit_code == 0, result.stderr
    assert asked == [("POST", "/v1/prefixes/x/verify")]
    assert "ok    alone, as plain transformers: 0 tokens differ; log-probabilities by 1.0e-06" in result.stdout
    assert "ok    control, without the prefix" in result.stdout
    assert result.stdout.endswith("\nPASS\n")


def test_fail_has_an_exit_status(antefix: Antefix, instead: Instead) -> None:
    broken = reply()["checks"][0] | {"ok": False, "tokens_differ": 7, "near_ties": 2}
    instead(lambda request: httpx.Response(200, json=reply(ok=False, checks=[broken], rows_beside=0)))
    result = antefix("verify", "x")
    assert result.exit_code == 1
    assert "fail  alone, as plain transformers: 7 tokens differ, 2 near ties" in result.stdout
    assert "fail  no other row ran at the same time" in result.stdout
    assert result.stdout.endswith("\nFAIL\n")


def test_what_a_server_sends_is_spelt_out(antefix: Antefix, instead: Instead) -> None:
    instead(lambda request: httpx.Response(200, json=reply(reference=HOSTILE)))
    assert SPELT in antefix("verify", "x").stdout


@pytest.mark.parametrize("change", [{"ok": "yes"}, {"ok": 1}])
def test_only_true_passes(antefix: Antefix, instead: Instead, change: dict[str, Any]) -> None:
    instead(lambda request: httpx.Response(200, json=reply(**change)))
    result = antefix("verify", "x")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "FAIL")


@pytest.mark.parametrize("change", [{"checks": 3}, {"prefix": {}}, {"controls": [{"ok": True}]}, {"neighbours": None}])
def test_another_kind_of_server_is_named(antefix: Antefix, instead: Instead, change: dict[str, Any]) -> None:
    instead(lambda request: httpx.Response(200, json=reply(**change)))
    result = antefix("verify", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("antefix: the server does not answer as an antefix server")


def test_a_prefix_that_is_not_there(antefix: Antefix) -> None:
    result = antefix("verify", "nobody")
    assert (result.exit_code, result.stderr) == (1, "antefix: there is no prefix 'nobody'\n")
