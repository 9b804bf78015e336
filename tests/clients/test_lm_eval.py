"""lm-evaluation-harness scores and writes over HTTP what plain transformers does with the prefix in its cache."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.calls import BASE, check_errors, generated, printed, python_program, question
from tests.clients.packages import environment, python_folder
from tests.docs import page
from tests.e2e.processes import ROOT, Running
from tests.parity.harness import plain_logits

pytestmark = pytest.mark.slow
TASKS = Path(__file__).parent / "tasks"
BUNDLED = ROOT / "prefix_store" / "bundled"
# of a whole document; the largest difference that was seen is 2.4e-5
TOLERANCE = 1e-4
Score = tuple[float, bool]


class Reference:
    """The bundled model as transformers has it, in float32."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "model")
        self.model = AutoModelForCausalLM.from_pretrained(BUNDLED / "model", dtype=torch.float32).eval()

    def score(self, context: str, ending: str, kv: torch.Tensor | None) -> Score:
        """The ending's log-probability, and whether each of its tokens is the likeliest.

        The harness counts spaces at the context's end to the ending, and begins with BOS where there is no context.
        """
        cut = len(context.rstrip())
        before = self.ids(context[:cut]) if context else [self.tokenizer.bos_token_id]
        ids = self.ids(context + ending) if context else before + self.ids(ending)
        rows = plain_logits(self.model, ids, kv)[len(before) - 1 : -1].log_softmax(-1)
        targets = torch.tensor(ids[len(before) :])
        total = rows.gather(1, targets[:, None]).double().sum()
        return float(total), bool((rows.argmax(-1) == targets).all())

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def prefixes() -> dict[str, torch.Tensor | None]:
    return {BASE: None, "plays": load_file(BUNDLED / "prefixes" / "plays.safetensors")["self.kv"]}


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    return environment("lm-eval") | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def test_it_scores_and_writes_as_plain_transformers_does(
    server: Running,
    url: str,
    reference: Reference,
    prefixes: dict[str, torch.Tensor | None],
    variables: dict[str, str],
    tmp_path: Path,
) -> None:
    shutil.copytree(TASKS, tmp_path, dirs_exist_ok=True)
    asked = question(url, models=list(prefixes), bos=reference.tokenizer.bos_token_id)
    read = python_program("lm_eval_calls.py", asked, variables, tmp_path)
    documents = [json.loads(line) for line in (TASKS / "documents.jsonl").read_text("utf-8").splitlines()]
    for name, kv in prefixes.items():
        other = prefixes["plays" if kv is None else BASE]
        found = read["answers"][name]
        for document, scored, rolling, written in zip(
            documents, found["scored"], found["rolling"], found["written"], strict=True
        ):
            context, ending = document["context"], document["ending"]
            assert_equal(scored, reference.score(context, ending, kv))
            assert abs(scored[0] - reference.score(context, ending, other)[0]) > 100 * TOLERANCE
            assert_equal([rolling, False], reference.score("", context + ending, kv))
            prompt = reference.ids(f"Once upon a time{context}")
            assert written == generated(server.client, name, prompt, max_tokens=12, stop=["\n"])
    for one, many in zip(read["answers"]["plays"]["scored"], read["answers"]["at once"]["scored"], strict=True):
        assert_equal(many, one)
    check_errors(read, "HTTPError")


def assert_equal(found: Any, expected: Any) -> None:
    assert abs(found[0] - expected[0]) < TOLERANCE
    assert bool(found[1]) == bool(expected[1])


def test_the_pages_example(
    url: str,
    reference: Reference,
    prefixes: dict[str, torch.Tensor | None],
    variables: dict[str, str],
    tmp_path: Path,
) -> None:
    examples = page.block("clients.md", "lm-evaluation-harness", "json", url)
    (tmp_path / "mine.jsonl").write_text(examples, "utf-8")
    (tmp_path / "mine.yaml").write_text(page.block("clients.md", "lm-evaluation-harness", "yaml", url), "utf-8")
    command = page.block("clients.md", "lm-evaluation-harness", "console", url).removeprefix("$ ").strip()
    programs = {"PATH": f"{python_folder('lm-eval') / 'bin'}:{variables['PATH']}"}
    shown = printed(["bash", "-c", command], variables | programs, tmp_path)
    texts = [json.loads(line)["text"] for line in examples.splitlines()]
    nats = -sum(reference.score("", text, prefixes["plays"])[0] for text in texts)
    (bits,) = re.findall(r"\|bits_per_byte *\|. *\| *([0-9.]+)\|", shown)
    assert float(bits) == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), abs=1e-3)
