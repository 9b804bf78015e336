"""Tiny sentencepiece files, made in code, and model folders that have them instead of a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_model

SOURCE = ["the king was there", "the queen was in the house", "there is a house in the garden", "who was the king"]
TARGET = ["der König war dort", "die Königin war im Haus", "dort ist ein Haus im Garten", "wer war der König"]
# as the authors' files of each family have them
SPECIAL = {
    "mbart": {"unk_id": 0, "bos_id": 1, "eos_id": 2},
    "pegasus": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
}
FILES = {"mbart": "sentencepiece.bpe.model", "pegasus": "spiece.model", "t5": "spiece.model"}
_REASON = "transformers reads such files with sentencepiece and protobuf, which the lock has"


def sentencepiece() -> Any:
    """The library; the test is skipped without it."""
    pytest.importorskip("google.protobuf", reason=_REASON)
    return pytest.importorskip("sentencepiece", reason=_REASON)


def train(file: Path, lines: list[str], **special: int) -> Any:
    """Writes pieces learned from the lines, and returns what cuts texts into them."""
    library, learned = sentencepiece(), file.with_name("learned")
    kind = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, **special}
    library.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(learned), **kind)
    learned.with_suffix(".model").rename(file)
    learned.with_suffix(".vocab").unlink()
    return library.SentencePieceProcessor(model_file=str(file))


def save_spiece(family: str, folder: Path) -> Any:
    """A folder whose tokenizer is one sentencepiece file; returns what cuts texts into its pieces."""
    tiny_model(family).save_pretrained(folder)
    return train(folder / FILES[family], SOURCE + TARGET, **SPECIAL[family])


def save_marian(folder: Path) -> Path:
    """A Marian as they are published: pieces of two languages and one vocabulary, which ends in the pad token.

    An answer begins with that and may not have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sides = [train(folder / f"{name}.spm", lines) for name, lines in (("source", SOURCE), ("target", TARGET))]
    pieces = [side.id_to_piece(index) for side in sides for index in range(side.get_piece_size())]
    each = dict.fromkeys(["<unk>", "</s>", *(piece for piece in pieces if piece != "<s>"), "<pad>"])
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(each)}))
    pad, size = len(each) - 1, {"vocab_size": len(each), "decoder_vocab_size": len(each)}
    model = tiny_model("marian", **size, pad_token_id=pad, decoder_start_token_id=pad)
    model.generation_config.bad_words_ids = [[pad]]
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    return folder
