"""What a job may ask for, by the model that it is to train for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefix_store.errors import InvalidRequest
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


def _check_stacks(asked: Any) -> None:
    try:
        stacks = some_stacks(asked) if asked is not None else ()
    except ValueError:
        return  # the specification's own check says what is wrong
    if set(stacks) - {Stack.SELF}:
        raise InvalidRequest(
            f"stacks: a model without an encoder has only self, got {', '.join(stacks)}", param="stacks"
        )
