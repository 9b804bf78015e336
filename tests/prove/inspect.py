"""What `antefix inspect` says of prefixes, put to the test on the bundled model: words, and what is missed most.

A prefix made of a text and not trained must be read back as that text. The virtual token that is ranked highest on some
texts must be missed more by other texts than the one ranked lowest: each is left out in turn, and all that such
a comparison needs is how likely each text is without each virtual token.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefix_store import codec
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply, attended, nearest, stored
from prefix_store.model.frozen import FrozenModel
from tests.bench.progress import say
from tests.bench.results import CACHE, Kept
from tests.prove.bundled import DATA, FOLDER, load
from trainer.bundled import prefix_data
from trainer.bundled.prefix_data import BundledPrefix
from trainer.data import Example, tokenize
from trainer.methods.start import initial_ids

SECTION = "inspect"
LENGTHS = (16, 32, 64)  # of prefixes made of texts
RANKED_ON, SPLITS = 10, 50  # held-out texts that a ranking is made on; how often they are drawn
BARS = {"read_back": 0.95, "told_apart": 0.9}


def run(kept: Kept | None = None, prefixes: Sequence[BundledPrefix] = prefix_data.PREFIXES) -> dict[str, Any]:
    """Resumable: each prefix's measurements are kept until all are there."""
    kept = kept or Kept(SECTION, CACHE)
    model = apply.attach(load())
    read_back, told_apart = {}, {}
    for prefix in prefixes:
        texts = held_out(model, prefix)
        file = FOLDER / "prefixes" / f"{prefix.name}.safetensors"
        made_of = hashlib.sha256(file.read_bytes() + model.digest.encode()).hexdigest()[:12]
        read_back[prefix.name] = kept.part(f"words {prefix.name} {made_of}", lambda t=texts: words(model, t))
        missed_by = kept.part(f"nats {prefix.name} {made_of}", lambda t=texts, f=file: measure(model, f, t))
        told_apart[prefix.name] = compare(missed_by)
        say(f"{prefix.name}: {read_back[prefix.name]:.1%} of words, {told_apart[prefix.name]['told_apart']:.0%} told")
    kept.clear()
    return {"read_back": read_back, "prefixes": told_apart}


def held_out(model: FrozenModel, prefix: BundledPrefix) -> list[Example]:
    """Texts that neither the model nor the prefix saw, without the end mark, which is our cut."""
    rows = prefix_data.choose(prefix, DATA, "dev")
    examples = tokenize(model.tokenizer, rows, model.context_length)
    return [Example(example.ids[:-1], example.prompt_length) for example in examples]


def words(model: FrozenModel, texts: Sequence[Example]) -> float:
    """Share of virtual tokens that name their own word first, in prefixes that begin as training lets them begin."""
    right = total = 0
    for length, text in zip(LENGTHS, texts, strict=False):
        spec = TrainingSpec(data_digest="0" * 64, examples=1, virtual_tokens=length)
        ids = initial_ids(model.tokenizer, spec, text.ids)
        found = nearest.to_kv(model, apply.prefill_kv(model, ids), 1).ids[:, 0].tolist()
        right += sum(a == b for a, b in zip(found, ids, strict=True))
        total += length
    return right / total


def measure(model: FrozenModel, file: Path, texts: Sequence[Example]) -> dict[str, Any]:
    """For each text: its tokens, its nats with the prefix and without each virtual token, the attention each gets."""
    manifest, tensors = codec.decode(file)
    kv = stored.kv_of(model, manifest, tensors)
    rows = stored.rows_of(model, manifest, tensors, kv)
    say(f"{file.stem}: {len(texts)} texts without each of {kv.shape[3]} virtual tokens")
    return {
        "tokens": [len(text.ids) - 1 for text in texts],
        "nats": [attended.nats_without(model, manifest, kv, text.ids).tolist() for text in texts],
        "shares": [attended.shares(model, rows, [text.ids]).by_token.tolist() for text in texts],
    }


def compare(measured: dict[str, Any], ranked_on: int = RANKED_ON) -> dict[str, Any]:
    """Ranks on some texts and judges by the others, many times over.

    `told_apart`: how often the highest was missed more; `by_attention`: the same for a ranking by attention. `highest`
    and `lowest`: by how many nats a token of the other texts is less likely without it, on average.
    """
    nats, tokens = torch.tensor(measured["nats"], dtype=torch.float64), torch.tensor(measured["tokens"])
    rises, shares = nats[:, 1:] - nats[:, :1], torch.tensor(measured["shares"], dtype=torch.float64)
    draws, found = random.Random(0), []
    for _ in range(SPLITS):
        ranking = draws.sample(range(len(rises)), ranked_on)
        others = [index for index in range(len(rises)) if index not in ranking]
        missed_by = rises[others].sum(0) / tokens[others].sum()
        rank, seen = rises[ranking].sum(0), (shares[ranking] * tokens[ranking, None]).sum(0)
        found.append([float(missed_by[each]) for each in (rank.argmax(), rank.argmin(), seen.argmax(), seen.argmin())])
    return {
        "virtual_tokens": rises.shape[1],
        "highest": sum(row[0] for row in found) / SPLITS,
        "lowest": sum(row[1] for row in found) / SPLITS,
        "told_apart": sum(row[0] > row[1] for row in found) / SPLITS,
        "by_attention": sum(row[2] > row[3] for row in found) / SPLITS,
    }


def mean(measured: dict[str, Any], what: str) -> float:
    """Over the prefixes."""
    rows = measured["prefixes"].values()
    return sum(row[what] for row in rows) / len(rows)


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    read_back = min(measured["read_back"].values())
    bars = {
        f"at least {BARS['read_back']:.0%} of a text's words read back": read_back >= BARS["read_back"],
        f"at least {BARS['told_apart']:.0%} told apart": mean(measured, "told_apart") >= BARS["told_apart"],
    }
    return [bar for bar, is_met in bars.items() if not is_met]


def table(measured: dict[str, Any]) -> str:
    """Prefixes down."""
    lines = [
        "| prefix, P | without the highest | without the lowest | highest missed more | ranked by attention | words |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in measured["prefixes"].items():
        loss = f"{row['highest']:+.4f} | {row['lowest']:+.4f}"
        told = f"{row['told_apart']:.0%} | {row['by_attention']:.0%} | {measured['read_back'][name]:.1%}"
        lines.append(f"| `{name}`, {row['virtual_tokens']} | {loss} | {told} |")
    told = f"{mean(measured, 'told_apart'):.1%} | {mean(measured, 'by_attention'):.1%}"
    lines.append(f"| all | | | {told} | {min(measured['read_back'].values()):.1%} at least |")
    return "\n".join(lines)
