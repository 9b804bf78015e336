"""The public-domain text that the bundled model reads, its tokenizer, and how well a model predicts what was held out.

Knows files and token ids; knows nothing about training. A corpus is a folder that holds the files of `SOURCES`.
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trainer.bundled import records

BOS, EOS = "<|bos|>", "<|eos|>"
HELD_OUT_FRACTION = 0.1

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# antefix-demo

A demonstration: a very small language model for trying prefixes without downloading anything.
Llama shape, {parameters:,} parameters:
{shape}.
Made by `python -m trainer.bundled.pretrain`, whose recipe is `trainer/bundled/recipe.py`.

- **Data**: public-domain text: prose from public-domain books, addresses of US presidents, the CIA World Factbook,
  Shakespeare; and text that `trainer/bundled/records.py` generates, invented records and sentences about them, so that
  the model learns to copy names and values from its context. Nothing else was read, for the weights or the tokenizer.
- **Licence**: the weights are under the project's Apache-2.0 licence.
- **Training**: {steps:,} steps, {tokens:,} tokens, {minutes:.0f} minutes on a shared CPU.
- **Limits**: sentences, not sense: no facts, a short memory, not tuned to follow instructions. It repeats the opinions
  and prejudices of old books. Not a source of information.

| held-out text | bits per byte |
|---|---|
{table}

Held out are other books, the last tenth of each of the other sources, and records whose names are in no training text.
"""


@dataclass(frozen=True)
class Source:
    """One text file. Blank lines part it into sections: a book, a speech, a country, or one speech of a play.

    `whole` says what a document is made of: whole sections (`"\\n\\n"` between them) or the lines of one section.
    The held-out text is `valid_file` where there is one, else the last tenth of the sections.
    """

    name: str
    repeats: int = 1
    whole: bool = False
    valid_file: str | None = None

    def sections(self, corpus: Path) -> list[str]:
        """The file's sections in order, training and held-out alike."""
        return split_sections((corpus / f"{self.name}.txt").read_text("utf-8"))

    def train_sections(self, corpus: Path) -> list[str]:
        """What may be trained on."""
        sections = self.sections(corpus)
        return sections if self.valid_file else sections[: held_out_start(sections)]

    def held_out(self, corpus: Path) -> list[str]:
        """What is only ever measured."""
        if self.valid_file:
            return split_sections((corpus / self.valid_file).read_text("utf-8"))
        sections = self.sections(corpus)
        return sections[held_out_start(sections) :]

    def documents(self, corpus: Path, paragraphs: int) -> Iterator[str]:
        """Training text in blocks of `paragraphs`, each once."""
        sections = self.train_sections(corpus)
        if self.whole:
            yield from ("\n\n".join(block) for block in blocks(sections, paragraphs))
            return
        for section in sections:
            yield from ("\n".join(block) for block in blocks(section.split("\n"), paragraphs))


SOURCES = (
    Source("books_simple", valid_file="books_simple_valid.txt"),
    Source("us_speeches"),
    Source("factbook", repeats=2),
    Source("tinyshakespeare", repeats=2, whole=True),
)
RECORDS, HELD_OUT_RECORDS = 44_000, 1_000  # generated documents, about a quarter of the training tokens
ECHOES, ECHO_WORDS, ECHO_TELLINGS = 20_000, (8, 48), (2, 4)


def split_sections(text: str) -> list[str]:
    """Text between blank lines, without the empty pieces."""
    return [section.strip("\n") for section in text.split("\n\n") if section.strip()]


def held_out_start(sections: list[str]) -> int:
    """Index of the first section that lies wholly in the last tenth of the text; at least one is held out."""
    limit = (1 - HELD_OUT_FRACTION) * sum(map(len, sections))
    ends = itertools.accumulate(map(len, sections))
    return min(sum(end <= limit for end in ends) + 1, len(sections) - 1)


def blocks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Consecutive runs of `size` items; the last may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def generated_documents() -> Iterator[str]:
    """Text that can only be known by copying it from what stands before."""
    return records.documents(seed=1, count=RECORDS)


def echoes(documents: Sequence[str], seed: int) -> Iterator[str]:
    """Words of the text in no order, told several times: only a model that copies from its context can predict them.

    Without them a model this small, on as little text, never learns to look back for what followed a word before.
    """
    draws = random.Random(f"echoes/{seed}")
    for _ in range(ECHOES):
        words = documents[int(draws.random() * len(documents))].split()
        told = " ".join(draws.choices(words, k=draws.randint(*ECHO_WORDS)))
        yield "\n".join([told] * draws.randint(*ECHO_TELLINGS))


def shuffled_documents(corpus: Path, paragraphs: int, seed: int) -> list[str]:
    """Every source's documents, each as often as the source repeats, and the generated ones; the seed orders them."""
    documents = [
        document for source in SOURCES for document in list(source.documents(corpus, paragraphs)) * source.repeats
    ]
    documents += generated_documents()
    random.Random(seed).shuffle(documents)
    return documents


def train_tokenizer(documents: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text survives encode and decode. BOS goes in front by default, EOS never does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],  # a Llama refuses token types
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def token_stream(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """`<|bos|> document <|eos|>` end to end, `[tokens]`, 16 bits each."""
    end = np.array([tokenizer.eos_token_id], dtype=np.uint16)
    pieces: list[np.ndarray] = []
    for block in blocks(documents, 1024):
        for encoding in tokenizer.backend_tokenizer.encode_batch(list(block)):
            pieces += [np.array(encoding.ids, dtype=np.uint16), end]
    return torch.from_numpy(np.concatenate(pieces).astype(np.int16))


def prepare(
    corpus: Path, folder: Path, *, vocabulary: int, context: int, paragraphs: int, seed: int
) -> tuple[PreTrainedTokenizerFast, torch.Tensor]:
    """The tokenizer, kept in `folder`, and the training text as tokens."""
    documents = shuffled_documents(corpus, paragraphs, seed)
    if not folder.exists():
        swap_in(folder, train_tokenizer(dict.fromkeys(documents), vocabulary, context).save_pretrained)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    # windows are drawn from anywhere in the stream, so it does not matter where the echoes stand
    return tokenizer, token_stream([*documents, *echoes(documents, seed)], tokenizer)


def swap_in(folder: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder beside its place, then puts it there: a failed write leaves the old one standing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as beside:
        fresh = Path(beside) / "fresh"
        write(fresh)
        for file in fresh.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone; an image runs as another user
        if folder.exists():
            folder.rename(Path(beside) / "old")
        fresh.rename(folder)


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, context: int = 512) -> float:
    """Comparable across tokenizers. Each token is scored once, after half a context or more wherever there is one."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids = torch.tensor([tokenizer.bos_token_id, *encoding.ids])
    nats, scored = 0.0, 1
    while scored < len(ids):
        end = min(scored + context // 2, len(ids))
        window = ids[max(0, end - context) : end]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        nats += losses[scored - end :].sum().item()
        scored = end
    return nats / math.log(2) / len(text.encode())


def held_out_bits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: Path, characters: int
) -> dict[str, float]:
    """Bits per byte by source, on the start of its held-out text."""
    texts = {source.name: "\n\n".join(source.held_out(corpus))[:characters] for source in SOURCES}
    generated = records.documents(seed=2, count=HELD_OUT_RECORDS, held_out=True)
    texts["records"] = "\n\n".join(generated)[:characters]
    return {name: bits_per_byte(model, tokenizer, text) for name, text in texts.items()}


def in_words(bits: dict[str, float]) -> str:
    """Bits per byte as one line of a log."""
    return "held out, bits per byte: " + "  ".join(f"{name} {value:.3f}" for name, value in bits.items())
