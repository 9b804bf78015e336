from __future__ import annotations

import threading
import time

import pytest

from prefix_store.cli import crowd
from prefix_store.cli.client import Busy, Failure


def test_answers_come_in_order_and_no_more_are_asked_at_once_than_may_be() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def ask(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02 if number % 2 else 0.001)
        with lock:
            running -= 1
        return -number

    assert crowd.ask_all(list(range(30)), ask, 4, "asking") == [-number for number in range(30)]
    assert most == 4


def test_a_failure_ends_it_and_nothing_new_is_asked() -> None:
    asked = []

    def ask(number: int) -> int:
        asked.append(number)
        if number == 3:
            raise Failure("no")
        time.sleep(0.01)
        return number

    with pytest.raises(Failure, match="no"):
        crowd.ask_all(list(range(1000)), ask, 2, "asking")
    assert len(asked) < 100


def test_a_full_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(crowd.time, "sleep", slept.append)
    refusals = iter([Busy("full", 2), Busy("full", 7)])

    def ask(number: int) -> int:
        for refusal in refusals:
            raise refusal
        return number

    assert crowd.patiently(ask, 5) == 5
    assert slept == [2, 7]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "PATIENCE_SECONDS", 0.0)

    def ask(number: int) -> int:
        raise Busy("full", 1)

    with pytest.raises(Busy, match="full"):
        crowd.patiently(ask, 1)
