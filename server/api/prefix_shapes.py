"""What replies about prefixes look like, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from server.api.shapes import Object, PrefixName


class Prefix(TypedDict):
    """A version; alone or among its name's also `current` and `aliases`, and `tenant` if it is another's."""

    tenant: NotRequired[str]
    id: str
    object: Literal["prefix"]
    version: int
    digest: str
    method: str
    virtual_tokens: int
    size_bytes: int
    created_at: int
    base_checked: bool
    job_id: str | None
    metadata: dict[str, str]
    pinned: bool
    expires_at: int | None
    current: NotRequired[bool]
    aliases: NotRequired[list[str]]


class PrefixPage(TypedDict):
    """A part of a list."""

    object: Literal["list"]
    data: list[Prefix]
    has_more: bool


class Sharing(TypedDict):
    """Whom a name is shared with."""

    id: str
    object: Literal["prefix.sharing"]
    tenants: Literal["all"] | list[str]


class Residency(TypedDict):
    """Whether the caller keeps a version on the device."""

    tenant: NotRequired[str]
    id: str
    object: Literal["prefix.residency"]
    version: int
    digest: str
    preloaded: bool


class Inspection(TypedDict):
    """What is in a prefix."""

    id: str
    object: Literal["prefix.inspection"]
    version: int
    digest: str
    method: str
    virtual_tokens: int
    prompt_tokens: int
    tokens: list[Object]
    layers: list[Object]
    attention: Object | None
    absent: dict[str, str]
    computed_with: str


class Verification(TypedDict):
    """Whether a prefix is served right."""

    object: Literal["prefix.verification"]
    prefix: PrefixName
    ok: bool
    checks: list[Object]
    controls: list[Object]
    rows_beside: int
    neighbours: list[str]
    prompts: int
    tokens: int
    reference: str
    computed_with: str
