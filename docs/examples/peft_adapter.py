"""Makes a PEFT prefix-tuning adapter of the bundled model, and prints what PEFT itself writes with it.

The adapter is not trained: its keys and values are those of a text, which is where tuning would start.
"""

import sys

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = "prefix_store/bundled/model"
TEXT = "The captain of the ship was an old man, and he told the boys of the sea and of the storms he had known."

prompt = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
cache = model(**tokenizer(TEXT, return_tensors="pt"), use_cache=True).past_key_values
kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])  # [L, 2, Hkv, P, D]

model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=kv.shape[3]))
flat = kv.permute(3, 0, 1, 2, 4).reshape(kv.shape[3], -1)  # PEFT keeps [P, L * 2 * Hkv * D]
model.prompt_encoder["default"].embedding.weight.data.copy_(flat)
model.eval().save_pretrained("adapter")

ids = tokenizer(prompt, return_tensors="pt")
written = model.generate(**ids, max_new_tokens=24, do_sample=False, temperature=None, top_p=None)
print(tokenizer.decode(written[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
