"""What uvicorn cannot read is answered like every other error."""

import asyncio
import json
from unittest import mock

import h11
import pytest

from server.api.wire import NO_HTTP, Protocol


def protocol() -> Protocol:
    made = Protocol.__new__(Protocol)
    made.conn, made.transport = h11.Connection(h11.SERVER), mock.Mock(spec=asyncio.Transport)
    return made


def written(of: Protocol) -> bytes:
    return b"".join(call.args[0] for call in of.transport.write.call_args_list)


def test_it_has_the_shape_of_every_error_and_closes() -> None:
    made = protocol()
    made.conn.receive_data(b"\0\1\2 / HTTP/1.1\r\n\r\n")
    with pytest.raises(h11.RemoteProtocolError):
        made.conn.next_event()
    made.send_400_response("Invalid HTTP request received.")
    head, _, body = written(made).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    for name in (b"content-type: application/json", b"connection: close", b"x-request-id: "):
        assert name in head
    shown = {"message": NO_HTTP, "type": "invalid_request_error", "param": None, "code": "invalid_request"}
    assert json.loads(body) == {"error": shown}
    made.transport.close.assert_called_once()


def test_an_answer_that_has_begun_is_cut_off() -> None:
    made = protocol()
    made.conn.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    made.conn.next_event()
    made.conn.send(h11.Response(status_code=200, headers=[("content-length", "5")]))
    made.send_400_response("Invalid HTTP request received.")
    assert written(made) == b""
    made.transport.close.assert_called_once()
