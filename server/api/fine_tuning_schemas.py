"""The JSON bodies of OpenAI's fine-tuning, and what they mean as options of a training job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import Field, model_validator

from prefix_store.errors import AntefixError, InvalidRequest
from prefix_store.jobs import DEFAULTS, TrainingSpec
from server.api.openai_schemas import LenientBody
from server.api.schemas import Integer, TrainingOptions

AUTO = "auto"
# the options that OpenAI has another name or place for
NAMED_OTHERWISE = re.compile(r"\b(?:epochs|batch_size|learning_rate|init_from)\b")


class Hyperparameters(LenientBody):
    """`learning_rate_multiplier` is of the method's own rate. What is `auto` is as good as absent."""

    n_epochs: Integer | None = None
    batch_size: Integer | None = None
    learning_rate_multiplier: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _without_auto(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value != AUTO} if isinstance(data, dict) else data


class Supervised(LenientBody):
    """How supervised training goes."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(LenientBody):
    """OpenAI's methods, of which only `supervised` is known here; how a prefix is tuned is `antefix.method`."""

    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {"type": ("supervised",), "dpo": (), "reinforcement": ()}
    WHERE: ClassVar[str] = "method."

    supervised: Supervised = Supervised()


class PrefixOptions(TrainingOptions):
    """The options that OpenAI has no names for."""

    WHERE: ClassVar[str] = "antefix."


class FineTuningBody(LenientBody):
    """POST /v1/fine_tuning/jobs."""

    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {"integrations": ([],)}

    model: str = Field(min_length=1)
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    method: Method = Method()
    suffix: str | None = None
    seed: Integer | None = None
    metadata: dict[str, str] = Field(default={})
    antefix: PrefixOptions = PrefixOptions()

    @model_validator(mode="before")
    @classmethod
    def _each_in_its_place(cls, data: Any) -> Any:
        """Passed over like other unknown fields, an option of ours would be trained without."""
        for name in data if isinstance(data, dict) else ():
            if name in TrainingOptions.model_fields and name not in cls.model_fields:
                raise InvalidRequest(f"{name} belongs into the object `antefix`", param=name)
        return data

    def options(self) -> dict[str, Any]:
        """Options of a training job. Raises InvalidRequest for one that is given twice and means two things."""
        found: dict[str, tuple[str, Any]] = {}
        for where, name, value in self._given():
            other, known = found.setdefault(name, (where, value))
            if known != value:
                raise InvalidRequest(f"{where} contradicts {other}", param=where)
        return {name: value for name, (_, value) in found.items()}

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Errors about an option become errors about what was written, where it was written."""
        places = {"init_from": "model"} | {name: where for where, name, _ in self._given()}
        try:
            yield
        except AntefixError as error:
            if error.param not in places:
                raise
            message = NAMED_OTHERWISE.sub(lambda found: places.get(found[0], found[0]), error.message)
            raise type(error)(message, param=places[error.param]) from None

    def _given(self) -> Iterator[tuple[str, str, Any]]:
        """Where each option stands, its name, and its value. Raises InvalidRequest for a rate out of bounds."""
        asked = self.antefix.options()
        yield from ((f"antefix.{name}", name, value) for name, value in asked.items())
        if self.seed is not None:
            yield "seed", "seed", self.seed
        rate = default_rate(asked.get("method", TrainingSpec.method))
        places = {"": self.hyperparameters, "method.supervised.": self.method.supervised.hyperparameters}
        for place, given in places.items():
            where = f"{place}hyperparameters"
            if given.n_epochs is not None:
                yield f"{where}.n_epochs", "epochs", given.n_epochs
            if given.batch_size is not None:
                yield f"{where}.batch_size", "batch_size", given.batch_size
            if given.learning_rate_multiplier is not None:
                multiplier = f"{where}.learning_rate_multiplier"
                yield multiplier, "learning_rate", _multiplied(rate, given.learning_rate_multiplier, multiplier)


def default_rate(method: str) -> float:
    """The learning rate that a job of this method has unless it asks for another."""
    rate: float = DEFAULTS.get(method, {}).get("learning_rate", TrainingSpec.learning_rate)
    return rate


def _multiplied(rate: float, multiplier: float, where: str) -> float:
    """The bounds are those of the rate, told as the asker counts."""
    low, high = TrainingSpec.LIMITS["learning_rate"]
    if not low <= rate * multiplier <= high:
        expected = f"from {low / rate:g} to {high / rate:g}, times the method's own rate of {rate:g}"
        raise InvalidRequest(f"{where} must be {expected}, got {multiplier:g}", param=where)
    return rate * multiplier
