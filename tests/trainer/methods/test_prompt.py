from __future__ import annotations

from functools import cache
from itertools import count, islice

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, OPTConfig

from prefix_store import tensors
from prefix_store.errors import ModelUnsupported
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply, frozen
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixManifest, Window
from tests.models import BOS, CONTEXT, FAMILIES, VOCABULARY, WINDOW, tiny_frozen, tiny_tokenizer
from trainer import schedule
from trainer.data import Example, collate, shuffled_batches
from trainer.loop import fit
from trainer.methods.prompt import SoftPrompt
from trainer.progress import Progress
from trainer.tuning import CLIP

P = WINDOW + 3  # more than a sliding layer sees at once
STEPS, RATE = 3, 0.3
EXAMPLES = [Example(tuple(range(first, first + length)), 3) for first, length in ((2, 9), (30, 6), (60, 12), (90, 7))]


@cache
def attached(family: str) -> FrozenModel:
    return apply.attach(tiny_frozen(family))


def spec(**options) -> TrainingSpec:
    given = {"virtual_tokens": P, "steps": STEPS, "batch_size": 2, "learning_rate": RATE, **options}
    return TrainingSpec("0" * 64, len(EXAMPLES), method="prompt", **given)


def make(family: str, **options) -> SoftPrompt:
    # from this text no gradient is so near 0 that Adam's first step, its sign, would be rounding's
    return SoftPrompt(attached(family), spec(**options), count(40))


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def plain_prompt_tuning(family: str, start: torch.Tensor) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """Lester et al. on transformers alone: the loss before each step, the gradient it took, the prompt after it."""
    model, unit, told = tiny_frozen(family).model, start.std().item(), []
    prompt = start.clone().requires_grad_()
    # a rate of 1 is a step of one unit; Adam's epsilon and the clip are gradients, and so in its inverse
    optimiser = torch.optim.Adam([prompt], eps=1e-8 / unit)
    for step, batch in enumerate(map(collate, islice(shuffled_batches(EXAMPLES, 2, seed=0), STEPS)), start=1):
        words = model.get_input_embeddings()(batch.ids)
        soft = prompt.expand(len(words), -1, -1)
        seen = torch.cat([torch.ones(len(words), P, dtype=torch.bool), batch.real_mask], dim=1)
        logits = model(inputs_embeds=torch.cat([soft, words], dim=1), attention_mask=seen).logits[:, P:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([prompt], CLIP / unit)
        optimiser.param_groups[0]["lr"] = unit * RATE * schedule.share("linear", step, STEPS, 0.05)
        optimiser.step()
        told.append((loss.item(), prompt.grad.clone(), prompt.detach().clone()))
    return told


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_training_is_that_of_embeddings_in_front_of_every_row(family):
    method, told = make(family), []
    start = method.embeds().detach()
    unit = start.std()

    def tell(progress: Progress) -> None:
        told.append((progress.train_loss, method.delta.grad / unit, method.embeds().detach()))

    def differences(other: torch.Tensor) -> list[float]:
        pairs = list(zip(told, plain_prompt_tuning(family, other), strict=True))
        loss = max(abs(mine[0] - theirs[0]) for mine, theirs in pairs)
        gradient = max(largest(mine[1], theirs[1]) / theirs[1].abs().max().item() for mine, theirs in pairs)
        return [loss, gradient, max(largest(mine[2], theirs[2]) for mine, theirs in pairs) / unit.item()]

    fit(attached(family), method, EXAMPLES, spec(), on_progress=tell)
    assert max(differences(start)) < 1e-4  # observed 1e-5
    assert min(differences(start.flip(0))) > 0.1  # observed 0.3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2"])
@torch.no_grad()
def test_a_prompt_is_what_peft_makes_of_it(family):
    method = make(family)
    method.delta += torch.randn(method.delta.shape, generator=torch.Generator().manual_seed(0))
    peft_model = get_peft_model(
        tiny_frozen(family).model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    )
    ids = torch.arange(2, 26).reshape(2, 12)
    weight = peft_model.prompt_encoder["default"].embedding.weight
    got = apply.logits(attached(family), ids, torch.ones_like(ids), method.rows(2))
    weight.copy_(method.tensors()["embeds"])
    assert largest(got, peft_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, P:]) < 2e-5
    weight.copy_(weight.flip(0))
    assert largest(got, peft_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, P:]) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_text_in_context(family):
    text = [BOS, *range(40, 40 + P - 1)]
    assert largest(make(family).kv(), apply.prefill_kv(tiny_frozen(family), text)) < 1e-5


@pytest.mark.parametrize("virtual_tokens", [1, P])
def test_a_step_moves_every_number_by_the_rate_in_units_of_the_spread(virtual_tokens):
    method = make("llama", virtual_tokens=virtual_tokens)
    before = method.embeds().detach()
    optimiser = torch.optim.AdamW(method.parameters(), lr=0.01, weight_decay=0.0)
    ids = torch.arange(2, 14).reshape(2, 6)
    apply.logits(attached("llama"), ids, torch.ones_like(ids), method.rows(2)).square().mean().backward()
    assert method.layers_without_gradient() == []
    optimiser.step()
    moved = (method.embeds().detach() - before).abs()
    torch.testing.assert_close(moved, (0.01 * before.std()).expand_as(moved), rtol=1e-2, atol=0.0)


def test_the_finished_prompt_is_a_sound_prefix_for_this_model():
    method = make("llama")
    manifest, kept = method.manifest(), method.tensors()
    model = attached("llama")
    assert manifest == PrefixManifest(Method.PROMPT, model.geometry, P, P, model.digest, Window.SLIDES)
    tensors.validate(manifest, kept)
    tensors.check_fits(manifest, model.geometry, model.digest, CONTEXT)
    method.delta.data += 1
    assert not torch.equal(kept["embeds"], method.tensors()["embeds"]), "what was taken does not move"


def test_embeddings_of_another_width_are_refused():
    numbers = {**FAMILIES["opt"][1], "word_embed_proj_dim": 24, "vocab_size": VOCABULARY, "pad_token_id": None}
    narrow = AutoModelForCausalLM.from_config(OPTConfig(**numbers), attn_implementation="eager")
    model = frozen.freeze(narrow, tiny_tokenizer(), digest="0" * 64, name="narrow")
    with pytest.raises(ModelUnsupported, match="24 numbers and its layers 48"):
        SoftPrompt(model, spec(), count(40))
