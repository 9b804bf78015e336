"""The form that browsers upload with: its file goes to the disk as it comes, the rest is short.

Not the framework's own, which keeps files in a temporary folder of the system and parts of any name to the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from prefix_store.errors import InvalidRequest
from server.api.receiving import Received

FILE = "file"


@dataclass
class Form:
    """What came: the short parts by name, the file and what it is called, and the sha256 of the whole body."""

    file: Received
    filename: str = ""
    fields: dict[str, bytes] = field(default_factory=dict)
    body_digest: str = ""


async def read(headers: Mapping[str, str], body: AsyncIterator[bytes], known: Mapping[str, int], to: Path) -> Form:
    """Reads a form with a part `file`, and others of which `known` says how many bytes each may have at most.

    Raises InvalidRequest for anything else.
    """
    form = Form(Received(to))
    reader = _Reader(form, known)
    sha256 = hashlib.sha256()
    try:
        parser = MultipartParser(_boundary(headers.get("content-type", "")), reader.callbacks())
        async for chunk in body:
            sha256.update(chunk)
            parser.write(chunk)
            await form.file.take(reader.of_the_file())
    except FormParserError as error:
        raise InvalidRequest(f"the form cannot be read: {str(error)[:200]}") from None
    if not reader.ended:
        raise InvalidRequest("the form ends before its last boundary")
    if FILE not in reader.seen:
        raise InvalidRequest("the form needs a part 'file' with a file name", param=FILE)
    await form.file.finish()
    form.body_digest = sha256.hexdigest()
    return form


class _Reader:
    """What the parser calls. It cannot wait, so a file's bytes lie here until they are asked for."""

    def __init__(self, form: Form, known: Mapping[str, int]) -> None:
        self._form = form
        self._known = known
        self._header = self._value = b""
        self._disposition = b""
        self._part = ""
        self._pending: list[bytes] = []
        self.seen: set[str] = set()
        self.ended = False

    def callbacks(self) -> Any:
        """By the parser's names for them."""
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
        return {f"on_{name}": getattr(self, name) for name in names}

    def of_the_file(self) -> bytes:
        """The bytes of the file that came since this was last asked."""
        data = b"".join(self._pending)
        self._pending.clear()
        return data

    def part_begin(self) -> None:
        self._disposition = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        part = options.get(b"name", b"").decode(errors="replace")
        if part != FILE and part not in self._known:
            names = ", ".join((FILE, *self._known))
            raise InvalidRequest(f"unknown part {part[:80]!r}; the parts are {names}", param=part[:80])
        if part in self.seen:
            raise InvalidRequest(f"the part {part!r} is given more than once", param=part)
        if part == FILE and b"filename" not in options:
            raise InvalidRequest("the form needs a part 'file' with a file name", param=FILE)
        if part == FILE:
            self._form.filename = options[b"filename"].decode(errors="replace")
        self._part = part
        self.seen.add(part)
        if part != FILE:
            self._form.fields[part] = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._part == FILE:
            self._pending.append(piece)
            return
        whole = self._form.fields[self._part] + piece
        if len(whole) > self._known[self._part]:
            most = self._known[self._part]
            raise InvalidRequest(f"the part {self._part!r} may have {most} bytes at most", param=self._part)
        self._form.fields[self._part] = whole

    def end(self) -> None:
        self.ended = True


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest(
            "the body must be a form (multipart/form-data); of prefixes, PUT /v1/prefixes/{name}/content takes the file"
        )
    return options[b"boundary"]
