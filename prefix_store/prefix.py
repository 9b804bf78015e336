"""The noun this project is about: references, methods, manifests and stored versions of prefixes."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from prefix_store.errors import InvalidName, InvalidPrefix, InvalidRequest
from prefix_store.geometry import ModelGeometry, Stack, some_stacks

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# An alias starts with a letter, so that `name@3` is always a version.
ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 of a-z 0-9 . _ -, beginning with a letter or digit"
FORMAT = 1
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
PLACE = "{prompt}"  # where in a template the prompt goes
LONGEST_TEMPLATE = 20_000


class Method(StrEnum):
    """How a prefix was tuned."""

    PREFIX = "prefix"
    PROMPT = "prompt"
    PREFIX_PLUS = "prefix_plus"
    TEXT = "text"


class Window(StrEnum):
    """What a sliding-window layer does with the prefix: lets it slide out of sight, or always sees it."""

    SLIDES = "slides"
    ALWAYS = "always"


def check_name(name: str, what: str = "prefix id") -> str:
    """Returns `name` if it is legal, else raises InvalidName."""
    if not NAME.fullmatch(name):
        raise InvalidName(f"{what} must be {NAME_RULE}; got {name[:80]!r}", param="id")
    return name


def check_template(template: str, param: str = "file") -> str:
    """Returns `template` if it is legal, else raises InvalidPrefix."""
    if len(template) > LONGEST_TEMPLATE or template.count(PLACE) != 1:
        raise InvalidPrefix(
            f"the template must contain {PLACE} exactly once, in at most {LONGEST_TEMPLATE} characters", param=param
        )
    return template


@dataclass(frozen=True)
class PrefixRef:
    """`tenant/name`, with at most one of a version and an alias; neither means the current version."""

    tenant: str
    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str, tenant: str) -> PrefixRef:
        """Reads `name`, `name@3`, `name@alias` or `tenant/name…`; a bare name is in `tenant`.

        Raises InvalidName, with what was expected.
        """
        owner, slash, rest = text.rpartition("/")
        name, at, tail = rest.partition("@")
        well_formed = bool(NAME.fullmatch(name)) and (not slash or bool(NAME.fullmatch(owner)))
        version = int(tail) if re.fullmatch(r"[1-9][0-9]{0,8}", tail) else None
        alias = tail if ALIAS.fullmatch(tail) else None
        if not well_formed or (at and version is None and alias is None):
            raise InvalidName(
                f"prefix reference must be name, name@version, name@alias or tenant/name; got {text[:80]!r}",
                param="prefix_id",
            )
        return cls(owner or tenant, name, version, alias)

    def __str__(self) -> str:
        tail = self.version if self.version is not None else self.alias
        return f"{self.tenant}/{self.name}" + (f"@{tail}" if tail is not None else "")


@dataclass(frozen=True)
class PrefixManifest:
    """Everything that changes what a prefix means; the header of its native file.

    `position_offset`: the position of the first real token. `base_digest`: sha256 over the base model's config and
    weights, or None where the file's origin did not say (then geometry alone decides). `template`: text with one
    `{prompt}` that the server applies to text prompts, or None. `stacks`: those that a KV prefix has keys and values
    for, `virtual_tokens` in each; a decoder-only model has but the one.
    """

    method: Method
    geometry: ModelGeometry
    virtual_tokens: int
    position_offset: int
    base_digest: str | None = None
    window: Window = Window.ALWAYS
    feature_map: str | None = None
    query: str = "post_rope"
    template: str | None = None
    stacks: tuple[Stack, ...] = (Stack.SELF,)

    def to_json(self) -> dict[str, Any]:
        """The object under `__metadata__["antefix"]`, key order fixed; `stacks` only where it says something."""
        whole = {"format": FORMAT, **dataclasses.asdict(self), "geometry": self.geometry.to_json()}
        stacks = [str(stack) for stack in whole.pop("stacks")]
        return whole if self.stacks == (Stack.SELF,) else {**whole, "stacks": stacks}

    @classmethod
    def from_json(cls, data: Any) -> PrefixManifest:
        """Reads `to_json`'s object. Raises InvalidPrefix with the field, what was expected and what came."""
        known = ["format", *(field.name for field in dataclasses.fields(cls) if field.name != "stacks")]
        if not isinstance(data, dict):
            raise InvalidPrefix("manifest must be a JSON object", param="file")
        if type(data.get("format")) is not int or data["format"] != FORMAT:
            raise InvalidPrefix(f"manifest.format must be {FORMAT}, got {repr(data.get('format'))[:40]}", param="file")
        unknown, missing = sorted(set(data) - {*known, "stacks"}), sorted(set(known) - set(data))
        if unknown or missing:
            raise InvalidPrefix(
                f"manifest fields: missing {missing}, unknown {[key[:40] for key in unknown]}", param="file"
            )
        try:
            manifest = cls(
                method=Method(data["method"]),
                geometry=ModelGeometry.from_json(data["geometry"]),
                virtual_tokens=_count(data, "virtual_tokens"),
                position_offset=_count(data, "position_offset"),
                base_digest=_optional(data, "base_digest", r"[0-9a-f]{64}"),
                window=Window(data["window"]),
                feature_map=_optional(data, "feature_map", r"elu|gelu"),
                query=data["query"],
                template=_optional(data, "template", r"(?s).*"),
                stacks=some_stacks(data.get("stacks", [Stack.SELF])),
            )
        except (ValueError, TypeError) as error:
            raise InvalidPrefix(f"manifest: {str(error)[:300]}", param="file") from None
        manifest._check()
        return manifest

    def _check(self) -> None:
        if self.query != "post_rope":
            raise InvalidPrefix("manifest.query must be 'post_rope'", param="file")
        if self.position_offset not in (0, self.virtual_tokens):
            raise InvalidPrefix("manifest.position_offset must be 0 or virtual_tokens", param="file")
        if (self.virtual_tokens == 0) != (self.method is Method.PREFIX_PLUS):
            raise InvalidPrefix(
                "manifest.virtual_tokens must be 0 for prefix_plus and positive otherwise", param="file"
            )
        if (self.feature_map is not None) != (self.method is Method.PREFIX_PLUS):
            raise InvalidPrefix("manifest.feature_map belongs to prefix_plus and only there", param="file")
        if self.method not in (Method.PREFIX, Method.TEXT) and self.stacks != (Stack.SELF,):
            raise InvalidPrefix(f"manifest.stacks belong to KV prefixes, not to {self.method}", param="file")
        if not set(self.stacks) <= set(self.geometry.stacks):
            raise InvalidPrefix(
                f"manifest.stacks: a model without an encoder has only 'self', got {list(map(str, self.stacks))}",
                param="file",
            )
        if self.template is not None:
            check_template(self.template)


def _count(data: dict[str, Any], key: str) -> int:
    value = data[key]
    if type(value) is not int or not 0 <= value <= 1_000_000:
        raise ValueError(f"{key} must be an integer from 0 to 1000000")
    return value


def _optional(data: dict[str, Any], key: str, pattern: str) -> str | None:
    value = data[key]
    if value is not None and not (isinstance(value, str) and re.fullmatch(pattern, value)):
        raise ValueError(f"{key} must be null or match {pattern}")
    return value


@dataclass(frozen=True)
class PrefixVersion:
    """One stored version: who, when and which job stand here, never in the file.

    What it is never changes; `metadata`, `pinned` and `expires_at` may. A pinned version is neither deleted nor does it
    expire; `expires_at` is in seconds of the store's clock.
    """

    tenant: str
    name: str
    version: int
    digest: str
    method: Method
    virtual_tokens: int
    size_bytes: int
    created_at: float
    base_digest: str | None = None
    job_id: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    pinned: bool = False
    expires_at: float | None = None

    @property
    def ref(self) -> PrefixRef:
        """The reference that names exactly this version."""
        return PrefixRef(self.tenant, self.name, self.version)

    def has_expired(self, now: float) -> bool:
        """Whether it is no longer to be had."""
        return self.expires_at is not None and self.expires_at <= now and not self.pinned

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as the store keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PrefixVersion:
        """Reads `to_json`'s object; fields that it does not know are a later version's."""
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {key: value for key, value in data.items() if key in known}
        return cls(**{**fields, "method": Method(data["method"])})


def check_metadata(metadata: Any) -> dict[str, str]:
    """Returns free-form notes on a version if they are legal: as many and as long as OpenAI's `metadata`.

    Raises InvalidRequest.
    """
    legal = (
        isinstance(metadata, dict)
        and len(metadata) <= MAX_METADATA
        and all(isinstance(key, str) and 0 < len(key) <= MAX_METADATA_KEY for key in metadata)
        and all(isinstance(value, str) and len(value) <= MAX_METADATA_VALUE for value in metadata.values())
    )
    if not legal:
        raise InvalidRequest(
            f"metadata must be at most {MAX_METADATA} texts of up to {MAX_METADATA_VALUE} characters under names of "
            f"up to {MAX_METADATA_KEY}",
            param="metadata",
        )
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("metadata is not valid Unicode", param="metadata") from None
    return dict(metadata)
