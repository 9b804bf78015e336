"""HTTP to a server: what the commands about work stand on. A failure is one line on stderr and exit status 1."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import httpx
import typer

DEFAULT_URL = "http://127.0.0.1:8000"
# No limit on reading: a generation may wait in the queue for long.
TIMEOUT = httpx.Timeout(30.0, read=None)


class Client:
    """A server, as its routes; replies are the JSON they hold."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """GET; parameters that are None are left out."""
        return self._json("GET", path, params={name: value for name, value in query.items() if value is not None})

    def post(self, path: str, **request: Any) -> dict[str, Any]:
        """POST with httpx's own arguments: `json`, `data`, `files`."""
        return self._json("POST", path, **request)

    def delete(self, path: str) -> dict[str, Any]:
        """DELETE."""
        return self._json("DELETE", path)

    def download(self, path: str, **query: Any) -> bytes:
        """The reply's bytes."""
        return self._send("GET", path, params=query).content

    def pages(self, path: str, key: str = "id") -> Iterator[dict[str, Any]]:
        """Every object of a list, page by page."""
        after = None
        while True:
            page = self.get(path, after=after)
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["data"][-1][key]

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed reply; one that holds an error ends the command."""
        try:
            with self._http.stream("POST", path, json=body) as reply:
                if reply.is_error:
                    reply.read()
                    _fail_with(reply)
                yield from _events(reply)
        except httpx.HTTPError as error:
            self._unreachable(error)

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = self._send(method, path, **request).json()
        except json.JSONDecodeError:
            fail(f"{self._http.base_url} does not answer as an antefix server")
        return reply

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            reply = self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            self._unreachable(error)
        except ValueError as error:  # a number that JSON has no word for
            fail(f"the request cannot be sent: {error}")
        if reply.is_error:
            _fail_with(reply)
        return reply

    def _unreachable(self, error: httpx.HTTPError) -> NoReturn:
        url = self._http.base_url
        if isinstance(error, httpx.ConnectError):
            fail(f"no server answers at {url}; start one with `antefix serve`, or set ANTEFIX_URL")
        fail(f"{url}: {type(error).__name__}: {error}")


@contextmanager
def connect() -> Iterator[Client]:
    """The server that ANTEFIX_URL names, with ANTEFIX_API_KEY."""
    key = os.environ.get("ANTEFIX_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=os.environ.get("ANTEFIX_URL") or DEFAULT_URL, headers=headers, timeout=TIMEOUT) as http:
        yield Client(http)


def fail(message: str) -> NoReturn:
    """Ends the command."""
    typer.echo(f"antefix: {message}", err=True)
    raise typer.Exit(1)


def _fail_with(reply: httpx.Response) -> NoReturn:
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {reply.status_code}"
    fail(message)


def _events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in reply.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            fail(event["error"]["message"])
        yield event
