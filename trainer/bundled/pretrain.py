"""Pretrains the small embedded default model: `python -m trainer.bundled.pretrain --corpus FOLDER --out FOLDER`.

The recipe is `trainer/bundled/recipe.py`. A run is bounded by minutes of training (or by steps), keeps its checkpoint
outside the tree, goes on from it when started again, and ends by swapping a finished model folder into place.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trainer.bundled import induction
from trainer.bundled.corpus import CARD, held_out_bits, in_words, prepare, swap_in
from trainer.bundled.recipe import Budget, Recipe

REPORT_EVERY, MEASURE_EVERY = 20, 200  # steps
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
N = TypeVar("N", int, float)
GLANCE, THOROUGH = 20_000, 400_000  # characters of each held-out text


class Run:
    """A model, its optimisers and where they are in the text: all that a checkpoint holds."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        self.recipe = recipe
        self.step, self.elapsed = 0, 0.0
        self.draws = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.model = LlamaForCausalLM(model_config(recipe, tokenizer))
        induction.install(self.model, self.draws)
        self.optimisers = make_optimisers(self.model, recipe)
        # needs a C++ compiler and saves a seventh of the time
        self.forward = torch.compile(self.model, dynamic=False) if recipe.compiled else self.model

    def batch(self, stream: torch.Tensor, window: int) -> torch.Tensor:
        """Windows from anywhere in the text, `[B, window + 1]`: the generator's state is the position in the data."""
        rows = max(1, self.recipe.batch_tokens // window)
        starts = torch.randint(0, len(stream) - window, (rows,), generator=self.draws)
        return stream[starts[:, None] + torch.arange(window + 1)].long()

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean nats per token of a batch."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.recipe.bf16):
            logits = self.forward(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def update(self, ids: torch.Tensor, scale: float) -> float:
        """One step on a batch; the loss before it, in nats per token."""
        loss = self.loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * scale
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Written beside and renamed: a reader sees the old checkpoint or the new one."""
        tensors = {f"model.{name}": value.detach() for name, value in self.model.named_parameters()}
        for number, optimiser in enumerate(self.optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{number}.{index}.{key}": value for key, value in state.items()}
        tensors["draws"] = self.draws.get_state()
        beside = path.with_suffix(".new")
        save_file(tensors, beside, {"step": str(self.step), "elapsed": str(self.elapsed)})
        os.replace(beside, path)

    def load(self, path: Path) -> None:
        """Goes on exactly where `save` stood."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            self.step, self.elapsed = int(file.metadata()["step"]), float(file.metadata()["elapsed"])
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(tensors[f"model.{name}"])
        for number, optimiser in enumerate(self.optimisers):
            optimiser.load_state_dict(optimiser.state_dict() | {"state": optimiser_state(tensors, number)})
        self.draws.set_state(tensors["draws"])


def optimiser_state(tensors: dict[str, torch.Tensor], number: int) -> dict[int, dict[str, torch.Tensor]]:
    """`optimiser.NUMBER.PARAMETER.KEY` back into torch's nesting."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(f"optimiser.{number}."):
            index, key = name.split(".")[2:]
            state.setdefault(int(index), {})[key] = value
    return state


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Llama-shaped: grouped-query attention, input and output embeddings tied."""
    return LlamaConfig(
        vocab_size=recipe.vocabulary,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        **{name: getattr(tokenizer, name) for name in MARKS},
        **recipe.size,
    )


def make_optimisers(model: PreTrainedModel, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices between the embeddings, AdamW for the embeddings, the norms and the biases."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    embeddings = [value for value in model.parameters() if id(value) in tables]
    norms = [value for value in model.parameters() if value.ndim == 1]
    matrices = [value for value in model.parameters() if value.ndim == 2 and id(value) not in tables]
    body = [{"params": matrices, "peak": recipe.matrix_rate}]
    others = [{"params": embeddings, "peak": recipe.embedding_rate}, {"params": norms, "peak": recipe.norm_rate}]
    return (
        torch.optim.Muon(body, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    )


@dataclass
class Watch:
    """What happens between steps: a line, a measurement, a checkpoint."""

    run: Run
    budget: Budget
    checkpoint: Path
    save_seconds: float
    measure: Callable[[], str]
    report: Callable[[str], None]
    saved: float = 0.0

    def __call__(self, loss: float) -> None:
        """After every step."""
        run = self.run
        if run.step % REPORT_EVERY == 0:
            left = run.elapsed / self.budget.progress(run.step, run.elapsed) - run.elapsed
            speed = run.step * run.recipe.batch_tokens / run.elapsed
            self.report(f"step {run.step}  loss {loss:.3f}  {speed:.0f} tokens/s  {left:.0f} s left")
        if run.step % MEASURE_EVERY == 0:
            self.report(self.measure())
        if run.elapsed - self.saved >= self.save_seconds:
            run.save(self.checkpoint)
            self.saved = run.elapsed


def fit(
    run: Run, stream: torch.Tensor, budget: Budget, clock: Callable[[], float], watch: Callable[[float], None]
) -> None:
    """Steps until the budget is spent; the time that counts is the time spent here, over all restarts."""
    started = clock() - run.elapsed
    while (progress := budget.progress(run.step, run.elapsed)) < 1:
        ids = run.batch(stream, run.recipe.window(progress))
        loss = run.update(ids, run.recipe.rate(progress, run.step))
        run.elapsed = clock() - started
        watch(loss)


def export(run: Run, tokenizer: PreTrainedTokenizerFast, bits: dict[str, float], out: Path) -> None:
    """The folder that is served: bf16 weights, tokenizer, sampling defaults, model card."""

    def write(folder: Path) -> None:
        marks = {name: getattr(tokenizer, name) for name in MARKS}
        run.model.generation_config = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95, **marks)
        run.model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(run, bits), "utf-8")

    swap_in(out, write)


def model_card(run: Run, bits: dict[str, float]) -> str:
    """What was trained, on what, how far, and how well."""
    shape = {**run.recipe.size, "vocabulary": run.recipe.vocabulary, "context": run.recipe.context}
    return CARD.format(
        parameters=run.model.num_parameters(),
        shape=", ".join(f"{name.replace('_', ' ').removeprefix('num ')} {value}" for name, value in shape.items()),
        steps=run.step,
        tokens=run.step * run.recipe.batch_tokens,
        minutes=run.elapsed / 60,
        table="\n".join(f"| `{name}` | {value:.3f} |" for name, value in bits.items()),
    )


def pretrain(
    corpus: Path,
    out: Path,
    checkpoints: Path,
    budget: Budget,
    recipe: Recipe,
    *,
    save_seconds: float = 120,
    report: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Trains, or goes on training, and exports; started again after the end it only exports again."""
    folder = checkpoints / recipe.fingerprint(corpus)
    tokenizer, stream = prepare(
        corpus,
        folder / "tokenizer",
        vocabulary=recipe.vocabulary,
        context=recipe.context,
        paragraphs=recipe.paragraphs,
        seed=recipe.seed,
    )
    run, checkpoint = Run(recipe, tokenizer), folder / "checkpoint.safetensors"
    if checkpoint.exists():
        run.load(checkpoint)
        report(f"goes on from step {run.step} after {run.elapsed:.0f} s")
    report(f"{run.model.num_parameters():,} parameters, {len(stream):,} tokens of text")

    def measure() -> str:
        return in_words(held_out_bits(run.model, tokenizer, corpus, GLANCE))

    watch = Watch(run, budget, checkpoint, save_seconds, measure, report, saved=run.elapsed)
    fit(run, stream, budget, clock, watch)
    run.save(checkpoint)
    bits = held_out_bits(run.model, tokenizer, corpus, THOROUGH)
    report(in_words(bits))
    export(run, tokenizer, bits, out)


def positive(number: Callable[[str], N]) -> Callable[[str], N]:
    """For argparse: a number above 0."""

    def read(text: str) -> N:
        if not 0 < float(text) < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return number(text)

    return read


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the committed recipe."""
    parser = argparse.ArgumentParser(prog="python -m trainer.bundled.pretrain", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the texts that corpus.py names")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write or to replace")
    parser.add_argument("--minutes", type=positive(float), default=110.0, help="training time over all restarts")
    parser.add_argument("--steps", type=positive(int), help="a fixed number of steps instead of a time")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("~/.cache/antefix/pretrain"))
    parser.add_argument("--threads", type=positive(int), default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    budget, checkpoints = Budget(args.minutes, args.steps), args.checkpoint_dir.expanduser()
    pretrain(args.corpus, args.out, checkpoints, budget, Recipe(), report=functools.partial(print, flush=True))


if __name__ == "__main__":
    main()
