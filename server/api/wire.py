"""HTTP/1.1 as uvicorn speaks it; what is none is refused in the form of every other error."""

from __future__ import annotations

import uuid

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefix_store.errors import InvalidRequest
from server.api import errors
from server.api.exchange import ID_HEADER

NO_HTTP = "this is not a request in HTTP/1.1, or its headers are larger than this server takes"


class Protocol(H11Protocol):
    """uvicorn's own, but for its answer to what cannot be read."""

    def send_400_response(self, msg: str) -> None:
        """Says so, and closes the connection; where an answer has begun, closing is all that can be said."""
        refusal = errors.response(InvalidRequest(NO_HTTP))
        headers = [*refusal.raw_headers, (ID_HEADER.encode(), uuid.uuid4().hex.encode()), (b"connection", b"close")]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(refusal.body)),
            h11.EndOfMessage(),
        )
        try:
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass
        self.transport.close()
