import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from server import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    written = io.StringIO()
    logs.configure(written)
    yield written
    root.handlers[:], root.level = before
    structlog.reset_defaults()


def test_both_kinds_of_loggers_write_one_json_object_a_line(stream: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("antefix.x").info("request", status=200)
        logging.getLogger("library").warning("odd %s", "thing")
    ours, theirs = map(json.loads, stream.getvalue().splitlines())
    assert (ours["event"], ours["status"], ours["request_id"], ours["level"]) == ("request", 200, "r1", "info")
    assert (theirs["event"], theirs["request_id"], theirs["logger"]) == ("odd thing", "r1", "library")


def test_an_exception_stays_on_its_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("inner")
    except ValueError:
        structlog.get_logger("antefix.x").exception("unhandled")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: inner" in json.loads(line)["exception"]
