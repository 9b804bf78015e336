"""The JSON bodies of OpenAI's fine-tuning, and what they mean as options of a training job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field, model_validator

from prefix_store.errors import InvalidRequest
from prefix_store.jobs import DEFAULTS, TrainingSpec
from server.api.openai_schemas import LenientBody
from server.api.schemas import Integer, TrainingOptions

AUTO = "auto"


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

    supervised: Supervised = Supervised()


class FineTuningBody(LenientBody):
    """POST /v1/fine_tuning/jobs. `antefix` has the options that OpenAI has no names for."""

    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {"integrations": ([],)}

    model: str = Field(min_length=1)
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    method: Method = Method()
    suffix: str | None = None
    seed: Integer | None = None
    metadata: dict[str, str] = Field(default={})
    antefix: TrainingOptions = TrainingOptions()

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
        found: dict[str, Any] = {}
        for where, name, value in self._given():
            if found.setdefault(name, value) != value:
                raise InvalidRequest(f"{where} contradicts another value given for {name}", param=where)
        return found

    def _given(self) -> Iterator[tuple[str, str, Any]]:
        """Where each option stands, its name, and its value."""
        asked = self.antefix.options()
        yield from ((f"antefix.{name}", name, value) for name, value in asked.items())
        if self.seed is not None:
            yield "seed", "seed", self.seed
        rate = default_rate(asked.get("method", TrainingSpec.method))
        places = {"hyperparameters": self.hyperparameters, "method": self.method.supervised.hyperparameters}
        for where, given in places.items():
            if given.n_epochs is not None:
                yield where, "epochs", given.n_epochs
            if given.batch_size is not None:
                yield where, "batch_size", given.batch_size
            if given.learning_rate_multiplier is not None:
                yield where, "learning_rate", rate * given.learning_rate_multiplier


def default_rate(method: str) -> float:
    """The learning rate that a job of this method has unless it asks for another."""
    rate: float = DEFAULTS.get(method, {}).get("learning_rate", TrainingSpec.learning_rate)
    return rate
