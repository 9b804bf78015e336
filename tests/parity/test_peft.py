"""A row with a PEFT adapter is PEFT's own model with that adapter, whatever the row's neighbours use."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from prefix_store.formats import peft
from server.engine.prefix_loader import payload_of
from server.scheduler.messages import PrefixPayload
from tests.models import VOCABULARY, tiny_frozen, tiny_model
from tests.parity.harness import TOLERANCE, Case, make_engine, run_mixed, sampled, worst_difference

LENGTHS = [1, 5, 20]
PROMPT_LENGTHS = [2, 9]
FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma", "phi"]


def save_adapters(family: str, folder: Path) -> list[Path]:
    """Prefixes of each length, and soft prompts of every make, written by PEFT itself."""
    prefixes = [PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length) for length in LENGTHS]
    prompts = [PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length) for length in PROMPT_LENGTHS]
    encoded = [
        PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=24, encoder_reparameterization_type=kind
        )
        for kind in ("MLP", "LSTM")
    ]
    paths = []
    for seed, config in enumerate([*prefixes, *prompts, *encoded]):
        torch.manual_seed(seed)  # PEFT draws its prefixes from the global generator
        get_peft_model(tiny_model(family), config).save_pretrained(str(folder / str(seed)))
        paths.append(folder / str(seed))
    return paths


@torch.inference_mode()
def peft_alone(model: PeftModel, case: Case) -> tuple[list[int], torch.Tensor]:
    ids, rows = list(case.prompt), []
    for _ in range(case.new):
        rows.append(model(torch.tensor([ids])).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    return ids[len(case.prompt) :], torch.stack(rows)


def imported(path: Path, served) -> PrefixPayload:
    config = (path / "adapter_config.json").read_bytes()
    manifest, tensors = peft.read(config, path / "adapter_model.safetensors", served.geometry)
    return payload_of(path.name, manifest, tensors, torch.float32)


@pytest.mark.parametrize("family", sampled(FAMILIES))
@pytest.mark.filterwarnings("ignore")
def test_mixed_rows_equal_pefts_own_model(family, tmp_path, record_worst):
    draw = random.Random(0)
    adapters = save_adapters(family, tmp_path)
    served = tiny_frozen(family)
    cases, prefixes, expected = [], [], []
    for index in range(2 * len(adapters)):
        path = adapters[index % len(adapters)]
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 4, 17])))
        cases.append(Case(prompt, None, new=6, arrives=index))
        prefixes.append(imported(path, served))
        expected.append(peft_alone(PeftModel.from_pretrained(tiny_model(family), str(path)).eval(), cases[-1]))
    engine = make_engine(served, step_tokens=9, rows=5)
    tokens = run_mixed(engine, cases, prefixes)
    worst = worst_difference(engine, [logits for _, logits in expected])
    record_worst(f"{family}, PEFT", worst)
    assert worst < TOLERANCE
    assert [tokens[str(index)] for index in range(len(cases))] == [alone for alone, _ in expected]

    swapped = make_engine(served)
    run_mixed(swapped, cases, prefixes[1:] + prefixes[:1])
    assert worst_difference(swapped, [logits for _, logits in expected]) > 100 * TOLERANCE
