"""Prefixes as other programs leave them on disk, by small modules of our own that share no code with the product.

Every builder writes a file and returns the keys and values that the program itself would put in front of its model, as
`[L, 2, Hkv, P, D]`: what an import of the file must come to.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from prefix_store.geometry import ModelGeometry


class Reparametrised(nn.Module):
    """A prefix as an MLP of an embedding, as Li & Liang and rinna train it; weights large enough to be heard."""

    def __init__(self, geometry: ModelGeometry, length: int, width: int, hidden: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.wte = nn.Embedding(length, width)
        sizes = (width, *hidden, 2 * geometry.layers * geometry.query_heads * geometry.head_dim)
        parts: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            parts += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        self.control_trans = nn.Sequential(*parts[:-1])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.3
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            self.wte.weight.mul_(width**0.5)

    def past_key_values(self) -> tuple[torch.Tensor, ...]:
        """Keys and values of each layer, `[2, 1, H, P, D]`, as both programs give them to the model."""
        heads, size = self.geometry.query_heads, self.geometry.head_dim
        rows = self.control_trans(self.wte(torch.arange(self.wte.num_embeddings)[None]))
        return rows.view(1, -1, 2 * self.geometry.layers, heads, size).permute(2, 0, 3, 1, 4).split(2)

    def kv(self) -> torch.Tensor:
        return torch.stack([layer[:, 0] for layer in self.past_key_values()]).detach()


def li_liang(path: Path, geometry: ModelGeometry, length: int, seed: int = 0, *, deep: bool = False) -> torch.Tensor:
    """`pytorch_model.bin` of their GPT-2 code: the state dict of the module."""
    prefix = Reparametrised(geometry, length, geometry.hidden_size, (32, 32) if deep else (32,), seed)
    torch.save(prefix.state_dict(), path)
    return prefix.kv()


def li_liang_bart(path: Path, geometry: ModelGeometry, length: int, stacks: Sequence[str]) -> dict[str, torch.Tensor]:
    """`pytorch_model.bin` of their BART code: a module for each stack in one state dict; keys and values by stack."""
    encoder = geometry.encoder
    assert encoder is not None
    sizes = {"layers": encoder.layers, "query_heads": encoder.heads, "head_dim": encoder.head_dim}
    endings = {"self": ("", ""), "cross": ("2", "2"), "encoder": ("_enc", "_enc")}
    state, found = OrderedDict(), {}
    for seed, stack in enumerate(stacks):
        own = replace(geometry, **sizes) if stack == "encoder" else geometry
        prefix = Reparametrised(own, length, geometry.hidden_size, (32,), seed)
        embedding, mlp = endings[stack]
        for name, tensor in prefix.state_dict().items():
            module, _, rest = name.partition(".")
            state[f"{module}{embedding if module == 'wte' else mlp}.{rest}"] = tensor
        found[stack] = prefix.kv()
    torch.save(state, path)
    return found


def rinna(path: Path, geometry: ModelGeometry, length: int, seed: int = 0, *, legacy: bool = False) -> torch.Tensor:
    """`smileface_suffix.task0.weight`: what the MLP gives, straight from the graph, and no name to it."""
    prefix = Reparametrised(geometry, length, 10, (10,), seed)
    torch.save(prefix.control_trans(prefix.wte.weight), path, _use_new_zipfile_serialization=not legacy)
    return prefix.kv()


def crumb_config(geometry: ModelGeometry, length: int) -> str:
    """`adapter_config.json` as PEFT's first versions wrote it."""
    width = geometry.query_heads * geometry.head_dim
    fields = {
        "base_model_name_or_path": "facebook/opt-2.7b",
        "encoder_hidden_size": width,
        "inference_mode": True,
        "num_attention_heads": geometry.query_heads,
        "num_layers": geometry.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "task_type": "CAUSAL_LM",
        "token_dim": width,
    }
    return json.dumps(fields, indent=2)


def crumb(folder: Path, geometry: ModelGeometry, length: int, seed: int = 0) -> torch.Tensor:
    """The folder of `ptune-FLAN-OPT-2.7b`: a config and a pickled state dict."""
    width = geometry.query_heads * geometry.head_dim
    flat = torch.randn(length, 2 * geometry.layers * width, generator=torch.Generator().manual_seed(seed))
    folder.mkdir()
    torch.save(OrderedDict(prompt_embeddings=flat), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(crumb_config(geometry, length))
    rows = flat.view(length, geometry.layers, 2, geometry.query_heads, geometry.head_dim)
    return torch.stack([rows[:, layer].permute(1, 2, 0, 3) for layer in range(geometry.layers)])


def cartridge(path: Path, geometry: ModelGeometry, length: int, seed: int = 0, *, fixed: int = 1) -> torch.Tensor:
    """A `.pt` file of the cartridges' trainer: four lists of parameters, the first tokens apart from the others."""
    generator = torch.Generator().manual_seed(seed)
    shape = 1, geometry.kv_heads, length, geometry.head_dim
    whole = {
        kind: [torch.randn(shape, generator=generator) for _ in range(geometry.layers)] for kind in ("keys", "values")
    }
    saved = {}
    for kind, layers in whole.items():
        saved[f"trainable_{kind}"] = nn.ParameterList([layer[:, :, fixed:].clone() for layer in layers])
        frozen = [nn.Parameter(layer[:, :, :fixed].clone(), requires_grad=False) for layer in layers]
        saved[f"fixed_{kind}"] = nn.ParameterList(frozen if fixed else [])
    torch.save(saved, path)
    return torch.stack([torch.cat(pair) for pair in zip(whole["keys"], whole["values"], strict=True)])
