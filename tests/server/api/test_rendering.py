import json
import threading
from types import SimpleNamespace

import anyio
import pytest

from server.api import rendering


def test_choices_are_written_one_by_one_into_the_same_json() -> None:
    reply, choices = {"id": "é", "usage": {"n": 1}}, [{"index": 0, "text": "a\nb"}, {"index": 1, "text": "ü"}]
    assert json.loads(rendering.written(reply, iter(choices))) == {**reply, "choices": choices}
    with pytest.raises(ValueError):
        rendering.written(reply, [{"x": float("nan")}])


@pytest.mark.anyio
@pytest.mark.parametrize(("tokens", "elsewhere"), [(1, False), (rendering.FEW, False), (rendering.FEW + 1, True)])
async def test_many_tokens_are_rendered_beside_the_event_loop(tokens: int, elsewhere: bool) -> None:
    services = SimpleNamespace(tokenizing=anyio.CapacityLimiter(1))
    thread = await rendering.of_tokens(tokens, threading.get_ident, services)
    assert (thread != threading.get_ident()) == elsewhere
