"""What a job may ask for, by the model that it is to train for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prefix_store.errors import InvalidRequest, InvalidTrainingData
from prefix_store.geometry import ModelGeometry, Stack, some_stacks
from prefix_store.jobs import Objective


def check_model(options: Mapping[str, Any], geometry: ModelGeometry) -> None:
    """Raises InvalidRequest for what no worker could do with a model of this geometry.

    `options` are fields of a TrainingSpec, of which some may lack.
    """
    if geometry.encoder is None:
        _check_stacks(options.get("stacks"))
        return
    if options.get("method") == "prefix_plus":
        raise InvalidRequest(
            "method prefix_plus cannot be trained for an encoder-decoder model; prefix and prompt can", param="method"
        )
    if options.get("objective") == Objective.DISTIL:
        raise InvalidRequest(
            "objective distil cannot be trained for an encoder-decoder model; lm can", param="objective"
        )


def check_examples(examples: Iterable[Mapping[str, Any]], geometry: ModelGeometry, param: str) -> None:
    """Raises InvalidTrainingData for a text where the model writes about what its encoder reads."""
    if geometry.encoder is None:
        return
    for number, example in enumerate(examples, start=1):
        if "text" in example:
            raise InvalidTrainingData(
                f"example {number}: expected a prompt and a completion, or messages, for an encoder-decoder model, "
                "got a text, which has no part for the encoder to read",
                param=param,
            )


def _check_stacks(asked: Any) -> None:
    try:
        stacks = some_stacks(asked) if asked is not None else ()
    except ValueError:
        return  # the specification's own check says what is wrong
    if set(stacks) - {Stack.SELF}:
        raise InvalidRequest(
            f"stacks: a model without an encoder has only self, got {', '.join(stacks)}", param="stacks"
        )
