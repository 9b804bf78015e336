"""The `model` of OpenAI's routes: the base model's name, or a reference to a prefix. Nothing else, and never a default.

What is neither is the same 404, whether the name could not be a prefix's, is nobody's, or is another tenant's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefix_store.errors import InvalidName, InvalidPrefix, InvalidRequest, ModelNotFound, PrefixNotFound
from prefix_store.prefix import PrefixVersion
from server.api import generation, references
from server.api.auth import Caller
from server.api.references import ServedPrefix
from server.api.services import Services


async def load(model: str, services: Services, caller: Caller) -> ServedPrefix | None:
    """What a call goes through: a prefix, or None for the base model. Raises ModelNotFound, InvalidRequest."""
    if model == services.frozen.name:
        check_bare(services)
        return None
    with known_as(model):
        return await generation.load_prefix(model, services, caller)


def resolve(model: str, services: Services, caller: Caller) -> PrefixVersion | None:
    """The version that a name means now, or None for the base model. Blocking. Raises ModelNotFound."""
    if model == services.frozen.name:
        return None
    with known_as(model):
        return references.resolve(services, model, caller)


def check_bare(services: Services) -> None:
    """Raises InvalidRequest where the base model is served behind prefixes only."""
    if services.require_prefix:
        raise InvalidRequest("model must name a prefix: this server does not serve the bare model", param="model")


@contextmanager
def known_as(model: str) -> Iterator[None]:
    """Errors about a prefix become errors about the model it was asked for as."""
    try:
        yield
    except (InvalidName, PrefixNotFound):
        missing = f"The model `{model[:80]}` does not exist or you do not have access to it."
        raise ModelNotFound(missing, param="model") from None
    except InvalidPrefix as error:
        raise type(error)(error.message, param="model") from None
