"""Pretrains the small BART that the comparison is made on: `python -m tests.prove.summarise.pretrain`.

It learns to tell a text back of which it sees a noisy copy; that it copies at all is put into it at its start. The
loop, the checkpoints and the optimisers are those of the bundled model (`trainer/bundled/pretrain.py`), the text is its
text, and the tokenizer is its tokenizer with a mask. A run goes on from its checkpoint when it is started again, and
leaves a model folder behind.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, GenerationConfig

from tests.prove.bundled import FOLDER, data_folder
from tests.prove.summarise import copying, noise
from trainer.bundled import pretrain as bundled
from trainer.bundled import recipe as numbers
from trainer.bundled.corpus import SOURCES, shuffled_documents, swap_in, token_stream
from trainer.data import IGNORED

CACHE = Path("~/.cache/antefix/prove").expanduser()
STEPS = 2400  # an hour and a quarter on two quiet cores
CHECKPOINT = "checkpoint.safetensors"
MASK, PAD = "<|mask|>", "<|pad|>"
SIZE = {
    "d_model": 256,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
}
HELD_OUT, HELD_OUT_ROWS, HELD_OUT_TOKENS = "books_simple", 64, 128


@dataclass(frozen=True)
class Recipe(numbers.Recipe):
    """Every number that decides the result. A row has from `shortest` tokens to a window's, and ends with a sentence.

    `masked` is the share of its tokens that is hidden, in spans of `span` on average.
    """

    vocabulary: int = 6146
    context: int = 256
    size: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(SIZE))
    windows: tuple[tuple[float, int], ...] = ((0.0, 255),)
    shortest: int = 16
    masked: float = 0.3
    span: float = 3.0
    bf16: bool = False  # not compiled, it gains nothing
    compiled: bool = False

    def fingerprint(self, corpus: Path) -> str:
        """Names a checkpoint by what the bundled model's is named by, and by where a BART starts."""
        return hashlib.sha256(f"{super().fingerprint(corpus)} {copying.NUMBERS}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Text:
    """Documents one behind the other, `[tokens]`, with a line's end between them, and where sentences end in it.

    `ends`, ascending, holds the places behind the last token of each.
    """

    ids: np.ndarray
    ends: np.ndarray

    def row(self, first: int, most: int) -> np.ndarray:
        """From the beginning of a sentence, the first behind `ends[first]`, to the end of one, or `most` tokens."""
        start = self.ends[first]
        last = self.ends[np.searchsorted(self.ends, start + most, side="right") - 1]
        return self.ids[start : last if last > start else start + most]


@dataclass(frozen=True)
class Noisy:
    """Padded rows: what the encoder reads `[B, S]` and where it is real, what the decoder has read and is to say."""

    source: torch.Tensor
    real_mask: torch.Tensor
    decoder: torch.Tensor
    labels: torch.Tensor


class Run(bundled.Run):
    """The bundled model's run with a BART in it, which is given `Text` and learns from `Noisy`."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.step, self.elapsed = 0, 0.0
        self.draws = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.model = BartForConditionalGeneration(config(recipe, tokenizer))
        copying.install(self.model, self.draws)
        self.optimisers = bundled.make_optimisers(self.model, recipe)
        self.ends = noise.sentence_ends(tokenizer)

    def batch(self, stream: Text, window: int) -> Noisy:
        """Rows of about one length from anywhere in the text; torch's generator is the position in the data."""
        most = int(torch.randint(self.recipe.shortest, window + 1, (), generator=self.draws))
        rows = max(1, self.recipe.batch_tokens // most)
        last = int(np.searchsorted(stream.ends, len(stream.ids) - window))
        firsts = torch.randint(last, (rows,), generator=self.draws).tolist()
        seed = int(torch.randint(2**62, (), generator=self.draws))
        return self.noisy([stream.row(first, most) for first in firsts], seed)

    def noisy(self, rows: list[np.ndarray], seed: int) -> Noisy:
        """The rows, permuted and masked, and themselves as what is to be said."""
        recipe, draws, mask = self.recipe, np.random.default_rng(seed), self.tokenizer.mask_token_id
        shuffled = [noise.permute(row, self.ends, draws) for row in rows]
        sources = [noise.infill(row, mask, recipe.masked, recipe.span, draws) for row in shuffled]
        bos, eos, pad = (getattr(self.tokenizer, name) for name in bundled.MARKS)
        source = padded([[bos, *row] for row in sources], pad)
        begun, ended = [[eos, *row] for row in rows], [[*row, eos] for row in rows]
        return Noisy(source, source != pad, padded(begun, pad), padded(ended, IGNORED))

    def loss(self, batch: Noisy) -> torch.Tensor:
        """Mean nats per token."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.recipe.bf16):
            logits = self.model(
                input_ids=batch.source,
                attention_mask=batch.real_mask.long(),
                decoder_input_ids=batch.decoder,
                use_cache=False,
            ).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())


def config(recipe: Recipe, tokenizer: Any) -> BartConfig:
    """BART's shape. As in BART, the decoder begins with the end of a text; nothing is dropped out."""
    return BartConfig(
        vocab_size=recipe.vocabulary,
        max_position_embeddings=recipe.context,
        **{name: getattr(tokenizer, name) for name in bundled.MARKS},
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
        dropout=0.0,
        **recipe.size,
    )


def say(line: str) -> None:
    """To stdout, at once."""
    print(line, flush=True)


def load_tokenizer() -> Any:
    """The bundled model's, with a mask, and padding that is not the end of a text."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model", model_max_length=Recipe().context)
    tokenizer.add_special_tokens({"mask_token": MASK, "pad_token": PAD})
    return tokenizer


def read(documents: list[str], tokenizer: Any) -> Text:
    """Tokenizes documents; where one ends, a sentence does."""
    stream = token_stream(documents, tokenizer).numpy()
    (line_end,) = tokenizer("\n", add_special_tokens=False).input_ids
    stream = np.where(stream == tokenizer.eos_token_id, line_end, stream)[stream != tokenizer.bos_token_id]
    return Text(stream, np.flatnonzero(noise.is_last(stream, noise.sentence_ends(tokenizer))) + 1)


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """`[B, longest]`, filled up on the right."""
    filled = torch.full((len(rows), max(map(len, rows))), value)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = torch.tensor(row)
    return filled


def held_out(run: Run, corpus: Path) -> Noisy:
    """Beginnings of paragraphs that are never trained on, with the same noise at all times."""
    source = next(source for source in SOURCES if source.name == HELD_OUT)
    text = read(source.held_out(corpus), run.tokenizer)
    last = np.searchsorted(text.ends, len(text.ids) - HELD_OUT_TOKENS) - 1
    firsts = np.linspace(0, last, HELD_OUT_ROWS).astype(int).tolist()
    return run.noisy([text.row(first, HELD_OUT_TOKENS) for first in firsts], seed=0)


def pretrain(
    corpus: Path,
    checkpoints: Path,
    budget: numbers.Budget,
    recipe: Recipe,
    *,
    save_seconds: float = 120,
    report: Callable[[str], None] = say,
    clock: Callable[[], float] = time.monotonic,
) -> Path:
    """Trains, or goes on training; returns the folder of the model. One that has ended is only returned."""
    folder = checkpoints / f"summarise-{recipe.fingerprint(corpus)}"
    finished, checkpoint = folder / "model", folder / CHECKPOINT
    if finished.exists():
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer()
    run, text = Run(recipe, tokenizer), read(shuffled_documents(corpus, recipe.paragraphs, recipe.seed), tokenizer)
    if checkpoint.exists():
        run.load(checkpoint)
        report(f"goes on from step {run.step} after {run.elapsed:.0f} s")
    report(f"{run.model.num_parameters():,} parameters, {len(text.ids):,} tokens of text, kept in {folder}")
    unseen = held_out(run, corpus)

    @torch.no_grad()
    def measure() -> str:
        return f"held out, nats per token: {HELD_OUT} {run.loss(unseen).item():.3f}"

    watch = bundled.Watch(run, budget, checkpoint, save_seconds, measure, report, saved=run.elapsed)
    bundled.fit(run, text, budget, clock, watch)
    run.save(checkpoint)
    report(measure())
    swap_in(finished, functools.partial(export, run))
    return finished


def export(run: Run, folder: Path) -> None:
    """Weights, tokenizer, and a generation config that forces nothing."""
    marks = {name: getattr(run.tokenizer, name) for name in bundled.MARKS}
    start = run.model.config.decoder_start_token_id
    run.model.generation_config = GenerationConfig(decoder_start_token_id=start, **marks)
    run.model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)


def finished() -> Path:
    """The committed recipe's model, made now if it is not there yet."""
    return pretrain(data_folder() / "corpus", CACHE, numbers.Budget(math.inf, STEPS), Recipe())


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(finished())
