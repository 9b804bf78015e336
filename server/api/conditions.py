"""What a request says in its headers about what it is for, and what it carries: If-Match, ETag, digests."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping

from fastapi import Request

from prefix_store.errors import InvalidRequest, PreconditionFailed
from prefix_store.name_records import ABSENT
from prefix_store.prefix import PrefixVersion

CONDITIONS = ("if-match", "if-none-match", "idempotency-key")
ETAG = re.compile(r'"([0-9a-f]{64})"')
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
CONTENT_DIGEST = re.compile(r"\s*sha-256=:([A-Za-z0-9+/=]*):\s*")


def unconditional(request: Request) -> None:
    """For changes that take no conditions: one that was passed over would be a change nobody wanted.

    Raises InvalidRequest.
    """
    for header in CONDITIONS:
        if header in request.headers:
            raise InvalidRequest(f"this route does not take {header}", param=header)


def etag(version: PrefixVersion) -> dict[str, str]:
    """The header that names a version's bytes."""
    return {"etag": f'"{version.digest}"'}


def is_known(headers: Mapping[str, str], version: PrefixVersion) -> bool:
    """Whether the caller has these bytes already, by If-None-Match."""
    tags = {tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")}
    return bool(tags & {"*", f'"{version.digest}"'})


def wanted(headers: Mapping[str, str]) -> str | None:
    """What must be the current version for a change to be made, as `PrefixStore` takes it.

    Raises InvalidRequest, and PreconditionFailed for an ETag that no prefix can have.
    """
    match, none_match = headers.get("if-match"), headers.get("if-none-match")
    if none_match is not None:
        if match is not None or none_match.strip() != "*":
            raise InvalidRequest("of If-None-Match a change takes * alone, for what must not be there yet")
        return ABSENT
    if match is None or match.strip() == "*":
        return match and "*"
    if "," in match:
        raise InvalidRequest("If-Match takes one ETag, or *")
    found = ETAG.fullmatch(match.strip())
    if found is None:
        raise PreconditionFailed(f"If-Match: no prefix has the ETag {match[:80]}; they are digests in quotes")
    return found[1]


def check_digest(headers: Mapping[str, str], file: str, body: str) -> None:
    """Raises InvalidRequest unless what came is what its sender says: sha256 of the file, and of the whole body."""
    said = headers.get("x-content-sha256")
    if said is not None:
        if not SHA256.fullmatch(said):
            raise InvalidRequest("X-Content-SHA256 must be 64 hex digits", param="x-content-sha256")
        _compare("X-Content-SHA256", said.lower(), file)
    said = headers.get("content-digest")
    if said is not None:
        _compare("Content-Digest", _hex(said), body)


def _hex(content_digest: str) -> str:
    """The sha-256 among the digests of RFC 9530."""
    for item in content_digest.split(","):
        found = CONTENT_DIGEST.fullmatch(item)
        if found is not None:
            try:
                return base64.b64decode(found[1], validate=True).hex()
            except binascii.Error:
                break
    raise InvalidRequest("Content-Digest must hold sha-256=:base64:", param="content-digest")


def _compare(header: str, said: str, came: str) -> None:
    if said != came:
        raise InvalidRequest(f"{header}: expected {said[:64]}, but what came has {came}", param=header.lower())
