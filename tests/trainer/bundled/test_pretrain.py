import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import prefix_store
from trainer.bundled import corpus, induction, pretrain

BUNDLED = Path(prefix_store.__file__).parent / "bundled" / "model"
TINY = pretrain.Recipe(
    vocabulary=320,
    context=64,
    size={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
    },
    windows=((0.0, 16), (0.5, 32)),
    batch_tokens=64,
    warmup_steps=4,
    compiled=False,
    matrix_rate=0.02,
    embedding_rate=0.1,
)
ODD_TEXT = ' Two  spaces, 1945 & a tab\t; "naïve" — 日本 🙂\n\nROMEO:\nAy me!\r\n'
WORDS = ("the", "a", "cat", "dog", "old", "king", "queen", "saw", "went", "home", "sea", "said", "little", "house")


def sentences(draws: random.Random, count: int) -> str:
    return " ".join(" ".join(draws.choices(WORDS, k=6)).capitalize() + "." for _ in range(count))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder of a few kilobytes in the layout of the real one."""
    folder, draws = tmp_path_factory.mktemp("corpus"), random.Random(7)
    for name in ("books_simple", "books_simple_valid", "us_speeches", "factbook"):
        blocks = ["\n".join(sentences(draws, 3) for _ in range(4)) for _ in range(20)]
        (folder / f"{name}.txt").write_text("\n\n".join(blocks), "utf-8")
    speeches = [f"KING:\n{sentences(draws, 2)}" for _ in range(60)]
    (folder / "tinyshakespeare.txt").write_text("\n\n".join(speeches), "utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(texts: Path) -> PreTrainedTokenizerFast:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "RECORDS", 20)
        patch.setattr(corpus, "ECHOES", 20)
        return corpus.train_tokenizer(corpus.shuffled_documents(texts, 4, seed=1), 320, 64)


@pytest.fixture(autouse=True)
def small_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short measurements, and one thread: for tensors this small the others only wait for each other."""
    monkeypatch.setattr(pretrain, "GLANCE", 200)
    monkeypatch.setattr(pretrain, "THOROUGH", 400)
    monkeypatch.setattr(corpus, "RECORDS", 20)
    monkeypatch.setattr(corpus, "ECHOES", 20)
    monkeypatch.setattr(corpus, "HELD_OUT_RECORDS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(texts: Path, folder: Path, steps: int = 24, **options: object) -> None:
    lines: list[str] = []
    budget = pretrain.Budget(minutes=60, steps=steps)
    arguments = {"recipe": TINY, "report": lines.append, **options}
    pretrain.pretrain(texts, folder / "model", folder / "checkpoints", budget, **arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_any_text_survives_the_tokenizer(tokenizer):
    ids = tokenizer(ODD_TEXT, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == ODD_TEXT


def test_bos_goes_in_front_and_eos_does_not_follow(tokenizer):
    ids = tokenizer("the cat").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_chat_template_names_the_speakers(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hello? "}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|>System: Be brief.\nUser: Hello?\nAssistant:"
    assert not tokenizer.apply_chat_template(messages, tokenize=False).endswith("Assistant:")


def test_stream_is_documents_between_their_marks(tokenizer):
    documents = ["The cat went home.", "The old king."]
    stream = corpus.token_stream(documents, tokenizer)
    assert tokenizer.decode(stream.tolist()) == "".join(f"<|bos|>{document}<|eos|>" for document in documents)


def test_held_out_text_is_in_no_training_document(texts):
    trained = "\n".join(corpus.shuffled_documents(texts, 4, seed=1))
    for source in corpus.SOURCES:
        held_out = source.held_out(texts)
        assert held_out
        assert all(paragraph not in trained for section in held_out for paragraph in section.split("\n")[1:])


def test_echoes_are_told_at_least_twice_and_only_in_words_of_the_text():
    text = ["the cat sat on a mat", "old kings went home"]
    for echo in corpus.echoes(text, seed=1):
        first, *others = echo.split("\n")
        assert others
        assert set(others) == {first}
        assert any(set(first.split()) <= set(document.split()) for document in text)
    assert list(corpus.echoes(text, seed=1)) == list(corpus.echoes(text, seed=1)) != list(corpus.echoes(text, seed=2))


def test_held_out_tail_is_about_a_tenth(texts):
    source = next(source for source in corpus.SOURCES if source.name == "tinyshakespeare")
    assert len(source.held_out(texts)) == pytest.approx(6, abs=1)
    assert source.train_sections(texts) + source.held_out(texts) == source.sections(texts)


def test_interrupted_run_ends_where_an_uninterrupted_one_does(texts, tmp_path):
    train(texts, tmp_path / "whole")

    def interrupt(line: str) -> None:
        if line.startswith("step 20 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(texts, tmp_path / "parts", report=interrupt, save_seconds=0)
    assert not (tmp_path / "parts" / "model").exists()
    lines: list[str] = []
    train(texts, tmp_path / "parts", report=lines.append)
    assert lines[0].startswith("goes on from step 19 ")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_another_seed_ends_elsewhere(texts, tmp_path):
    train(texts, tmp_path / "one", steps=3)
    train(texts, tmp_path / "two", steps=3, recipe=dataclasses.replace(TINY, seed=2))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_training_lowers_the_loss(texts, tokenizer):
    run = pretrain.Run(TINY, tokenizer)
    stream = corpus.token_stream(corpus.shuffled_documents(texts, 4, seed=1), tokenizer)
    losses = [run.update(run.batch(stream, 16), TINY.rate(0, step)) for step in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_finished_run_is_only_exported_again(texts, tmp_path):
    train(texts, tmp_path, steps=2)
    before = weights(tmp_path)
    (tmp_path / "model" / "left-over").touch()
    lines: list[str] = []
    train(texts, tmp_path, steps=2, report=lines.append)
    assert lines[0].startswith("goes on from step 2 ")
    assert same(before, weights(tmp_path))
    assert not (tmp_path / "model" / "left-over").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "checkpoints"}


def test_another_recipe_or_text_is_another_run(texts, tmp_path):
    (tmp_path / "corpus").mkdir()
    for file in texts.iterdir():
        (tmp_path / "corpus" / file.name).write_bytes(b"more" * (file.stem == "factbook") + file.read_bytes())
    runs = [(TINY, texts), (dataclasses.replace(TINY, clip=2.0), texts), (TINY, tmp_path / "corpus")]
    assert len({recipe.fingerprint(folder) for recipe, folder in runs}) == 3


def test_another_start_is_another_run(texts, monkeypatch):
    before = TINY.fingerprint(texts)
    monkeypatch.setattr(induction, "NUMBERS", (*induction.NUMBERS[:-1], 0.007))
    assert TINY.fingerprint(texts) != before


@pytest.mark.parametrize("argument", ["--minutes=-1", "--minutes=nan", "--minutes=0", "--steps=0", "--threads=0"])
def test_a_run_of_no_length_is_refused(texts, argument, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--corpus", str(texts), "--out", "unused", argument])
    assert "expected a number above 0" in capsys.readouterr().err


def test_command_line(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "Recipe", lambda: TINY)
    folders = ["--corpus", str(texts), "--out", str(tmp_path / "out"), "--checkpoint-dir", str(tmp_path / "kept")]
    pretrain.main([*folders, "--steps", "2", "--threads", "1"])
    assert "held out, bits per byte: books_simple" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert list((tmp_path / "kept").glob("*/checkpoint.safetensors"))


def test_failed_write_leaves_the_old_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        corpus.swap_in(tmp_path / "model", fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_saved_folder_loads_anywhere(texts, tmp_path):
    train(texts, tmp_path, steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 64
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer("the cat").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer(ODD_TEXT, add_special_tokens=False).input_ids) == ODD_TEXT
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "demonstration" in card
    assert "2 steps, 128 tokens" in card
    assert all((path.stat().st_mode & 0o777) == 0o644 for path in (tmp_path / "model").iterdir())


def test_bits_per_byte_of_a_uniform_model(tokenizer):
    """All logits equal: every token costs log2(V) bits, whatever the windows."""
    model = pretrain.Run(TINY, tokenizer).model
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    text = "The old king went home. " * 20
    tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
    expected = tokens * torch.tensor(320.0).log2().item() / len(text.encode())
    assert corpus.bits_per_byte(model, tokenizer, text, context=16) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sample", [False, True])
def test_bundled_model_writes_printable_text(sample):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    encoded = tokenizer("Once upon a time", return_tensors="pt")
    ids = model.generate(**encoded, max_new_tokens=24, do_sample=sample, temperature=None, top_p=None)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time")
    assert len(text) > 30
    assert all(character.isprintable() or character == "\n" for character in text)
