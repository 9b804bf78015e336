"""How prefixes are tuned: one method a file, and the table of them."""

from __future__ import annotations

from prefix_store.prefix import Method
from trainer.methods.base import NewMethod
from trainer.methods.prefix import DirectKV

METHODS: dict[Method, NewMethod] = {Method.PREFIX: DirectKV}
