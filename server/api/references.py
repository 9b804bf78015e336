"""From the reference in a request to a stored version. Another tenant's prefix is not told apart from none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from anyio import to_thread

from prefix_store.errors import InvalidName, InvalidPrefix, InvalidRequest, PrefixNotFound
from prefix_store.prefix import PrefixRef, PrefixVersion, check_name
from server.api.auth import Caller
from server.api.services import Services
from server.scheduler.messages import PrefixPayload

PREFIX = "prefix"


@dataclass(frozen=True)
class ServedPrefix:
    """The prefix of a call: which version it is, what the engine takes of it, and its template."""

    version: PrefixVersion
    payload: PrefixPayload
    template: str | None
    reader: str

    def to_json(self) -> dict[str, Any]:
        """How a reply names it: with its tenant, if it is another's."""
        version = self.version
        named = {"id": version.name, "version": version.version, "digest": version.digest}
        return named if version.tenant == self.reader else {"tenant": version.tenant, **named}


def own(text: str, caller: Caller) -> PrefixRef:
    """A reference to what the caller may change, which is only its own. Raises InvalidName, PrefixNotFound."""
    ref = PrefixRef.parse(text, caller.tenant)
    if ref.tenant != caller.tenant:
        raise unknown(text)
    return ref


def resolve(services: Services, text: str, caller: Caller) -> PrefixVersion:
    """The version that a reference means now, the caller's or shared with it. Blocking.

    Raises InvalidName, PrefixNotFound.
    """
    with missing_as(text):
        return services.store.prefixes.resolve(PrefixRef.parse(text, caller.tenant), caller.tenant)


async def load(services: Services, text: str, caller: Caller) -> ServedPrefix:
    """The prefix behind a reference, ready for the engine. Raises what `resolve` and `PrefixLoader.load` raise.

    While the store is away, the reference means to each tenant what it lately meant.
    """
    version = await services.recent.ask(PREFIX, (caller.tenant, text), lambda: resolve(services, text, caller))
    try:
        # what is there needs no thread, of which those that wait for a store may have taken all
        loaded = services.loader.find(version)
        if loaded is None:
            loaded = await to_thread.run_sync(services.loader.load, version)
    except InvalidPrefix as error:
        raise type(error)(error.message, param="prefix_id") from None
    return ServedPrefix(version, loaded.payload, loaded.template, caller.tenant)


def decoder_only(services: Services, what: str) -> None:
    """Raises InvalidRequest for what cannot be done with an encoder-decoder model's prefixes."""
    if services.frozen.is_encoder_decoder:
        family = services.frozen.geometry.family
        raise InvalidRequest(f"{family} is an encoder-decoder model, whose prefixes cannot {what} yet")


@contextmanager
def changing(services: Services, caller: Caller, name: str, text: str | None = None) -> Iterator[None]:
    """Around a change of the caller's name, of which this server then remembers nothing from before.

    What the store does not find is missing under `text`, by default the name.
    """
    try:
        with missing_as(text or name):
            yield
    finally:  # also of one that failed: a store that does not answer may have made it
        services.recent.forget(
            lambda place, answer: place[0] == PREFIX and (answer.tenant, answer.name) == (caller.tenant, name)
        )


def new_name(services: Services, name: str) -> str:
    """A name that a prefix may be given. Raises InvalidName."""
    if check_name(name) == services.frozen.name:
        raise InvalidName(f"{name!r} is the base model's name; a prefix needs another", param="id")
    return name


@contextmanager
def missing_as(text: str) -> Iterator[None]:
    """What the store does not find is missing under the name that it was asked for by."""
    try:
        yield
    except PrefixNotFound:
        raise unknown(text) from None


def unknown(text: str) -> PrefixNotFound:
    """The same for all that cannot be found."""
    return PrefixNotFound(f"there is no prefix {text[:80]!r}", param="prefix_id")
