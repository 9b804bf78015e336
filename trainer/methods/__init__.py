"""How prefixes are tuned: one method a file, and the table of them."""

from __future__ import annotations

from trainer.methods.base import NewMethod
from trainer.methods.prefix import DirectKV
from trainer.methods.prompt import SoftPrompt

METHODS: dict[str, NewMethod] = {"prefix": DirectKV, "prompt": SoftPrompt}
