"""What all of PEFT's prompts have in common: the tensor's name, and a config that may be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefix_store.errors import InvalidPrefix

CONFIG_FILE = "adapter_config.json"
TENSOR = "prompt_embeddings"


def check_numbers(fields: Mapping[str, Any], numbers: Mapping[str, tuple[int, type[InvalidPrefix]]]) -> None:
    """Raises each number's own error where the config says it, and says another one."""
    for key, (number, error) in numbers.items():
        value = fields.get(key)
        if value is not None and (type(value) is not int or value != number):
            raise config_error(key, number, value, error)


def config_error(
    field: str, expected: object, got: object, error: type[InvalidPrefix] = InvalidPrefix
) -> InvalidPrefix:
    """An error that names the field."""
    return error(f"{CONFIG_FILE}: {field}: expected {expected}, got {str(got)[:80]}", param="config")
