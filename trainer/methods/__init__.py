"""How prefixes are tuned: one method a file, and the table of them."""

from __future__ import annotations

from trainer.methods.base import NewMethod
from trainer.methods.prefix import DirectKV
from trainer.methods.prefix_mlp import MLPPrefix
from trainer.methods.prefix_plus import HeadMemory
from trainer.methods.prompt import SoftPrompt
from trainer.methods.prompt_encoded import LSTMPrompt, MLPPrompt
from trainer.methods.stacks import by_stack

METHODS: dict[str, NewMethod] = {
    "prefix": by_stack(DirectKV),
    "prefix_mlp": by_stack(MLPPrefix),
    "prompt": SoftPrompt,
    "prompt_mlp": MLPPrompt,
    "prompt_lstm": LSTMPrompt,
    "prefix_plus": HeadMemory,
}
