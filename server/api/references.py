"""From the reference in a request to a stored version. Another tenant's prefix is not told apart from none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefix_store.errors import InvalidName, InvalidPrefix, PrefixNotFound
from prefix_store.prefix import PrefixRef, PrefixVersion, check_name
from server.api.auth import Caller
from server.api.services import Services
from server.scheduler.messages import PrefixPayload


@dataclass(frozen=True)
class ServedPrefix:
    """The prefix of a call: which version it is, what the engine takes of it, and its template."""

    version: PrefixVersion
    payload: PrefixPayload
    template: str | None

    def to_json(self) -> dict[str, Any]:
        """How a reply names it."""
        return {"id": self.version.name, "version": self.version.version, "digest": self.version.digest}


def parse(text: str, caller: Caller) -> PrefixRef:
    """The caller's reference. Raises InvalidName, PrefixNotFound."""
    ref = PrefixRef.parse(text, caller.tenant)
    if ref.tenant != caller.tenant:
        raise unknown(text)
    return ref


def resolve(services: Services, text: str, caller: Caller) -> PrefixVersion:
    """The version that a reference means now. Blocking. Raises InvalidName, PrefixNotFound."""
    try:
        return services.store.prefixes.resolve(parse(text, caller))
    except PrefixNotFound:
        raise unknown(text) from None


def load(services: Services, text: str, caller: Caller) -> ServedPrefix:
    """The prefix behind a reference, ready for the engine. Blocking. Raises also what `PrefixLoader.load` raises."""
    version = resolve(services, text, caller)
    try:
        loaded = services.loader.load(version)
    except InvalidPrefix as error:
        raise type(error)(error.message, param="prefix_id") from None
    return ServedPrefix(version, loaded.payload, loaded.template)


def new_name(services: Services, name: str) -> str:
    """A name that a prefix may be given. Raises InvalidName."""
    if check_name(name) == services.frozen.name:
        raise InvalidName(f"{name!r} is the base model's name; a prefix needs another", param="id")
    return name


def unknown(text: str) -> PrefixNotFound:
    """The same for all that cannot be found."""
    return PrefixNotFound(f"there is no prefix {text[:80]!r}", param="prefix_id")
