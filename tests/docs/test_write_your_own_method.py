"""The page's code is taken from the page and run: the method by a real worker, its tests as they stand."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from prefix_store import tensors
from prefix_store.errors import InvalidRequest
from prefix_store.jobs import JobStatus, TrainingSpec
from prefix_store.model import apply
from prefix_store.prefix import Method, PrefixRef
from prefix_store.store import Store
from server.settings import Settings as ServerSettings
from tests.models import CONTEXT, tiny_frozen
from trainer.methods import METHODS, files
from trainer.settings import Settings
from trainer.worker import Worker

PAGE = Path(__file__).parents[2] / "docs" / "write-your-own-method.md"
METHOD, TESTS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
TENANT, P, RANK = "acme", 8, 2
INIT = "this is a number"
EXAMPLES = [{"prompt": f"{number} is", "completion": " a number"} for number in range(12)]
FROZEN = apply.attach(tiny_frozen("llama"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "low_rank.py").write_text(METHOD)
    return tmp_path / "low_rank.py"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def test_the_method_is_one_short_file():
    assert len(METHOD.splitlines()) <= 80
    assert re.findall(r"^ANTEFIX_METHODS=(\S+) ", PAGE.read_text(), re.MULTILINE) == ["low_rank.py"]


def test_a_worker_trains_it_and_publishes_a_prefix_of_its_own(path, store):
    allowed = ServerSettings(methods=str(path)).method_names
    options = {
        "virtual_tokens": P, "steps": 15, "batch_size": 16, "max_length": 24, "learning_rate": 0.3, "init_text": INIT
    }  # fmt: skip
    jobs = {
        name: store.jobs.submit(TENANT, name.replace("_", "-"), EXAMPLES, {**options, "method": name}, methods=allowed)
        for name in ("low_rank", "prefix")
    }
    methods = {**METHODS, **files.load(Settings(methods=str(path)).methods)}
    assert Worker(store, FROZEN, "w", methods=methods, say=lambda line: None).run_until_empty() == len(jobs)
    ended = store.jobs.job(TENANT, jobs["low_rank"].id)
    assert (ended.status, ended.error, ended.spec.method) == (JobStatus.SUCCEEDED, None, "low_rank")
    losses = [
        event.data["train_loss"] for event in store.jobs.events(TENANT, ended.id, 0, 100) if event.kind == "metrics"
    ]
    assert losses[-1] < losses[0] - 0.5

    manifest, kept = store.prefixes.read(store.prefixes.resolve(PrefixRef(TENANT, "low-rank")))
    assert manifest.method is Method.PREFIX
    tensors.check_fits(manifest, FROZEN.geometry, FROZEN.digest, CONTEXT)
    _, direct = store.prefixes.read(store.prefixes.resolve(PrefixRef(TENANT, "prefix")))
    start = METHODS["prefix"](FROZEN, TrainingSpec("0" * 64, 1, virtual_tokens=P, init_text=INIT), []).kv()
    assert ranks(kept["self.kv"] - start) == {RANK}
    assert min(ranks(direct["self.kv"] - start)) > RANK


def ranks(offsets: torch.Tensor) -> set[int]:
    """Of each layer's keys and values, as matrices of virtual tokens by numbers; offsets are `[L, 2, Hkv, P, D]`."""
    return set(torch.linalg.matrix_rank(offsets.transpose(2, 3).flatten(3), rtol=1e-3).flatten().tolist())


def test_a_server_that_was_not_told_of_it_refuses_its_jobs(store):
    with pytest.raises(InvalidRequest, match="'low_rank' cannot be trained"):
        store.jobs.submit(
            TENANT, "x", EXAMPLES, {"method": "low_rank"}, methods=ServerSettings(methods="").method_names
        )


def test_one_virtual_token_is_refused(path):
    with pytest.raises(InvalidRequest, match="needs others"):
        files.load({"low_rank": path})["low_rank"](FROZEN, TrainingSpec("0" * 64, 1, virtual_tokens=1), count(2))


def test_the_tests_on_the_page_pass(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    (path.parent / "test_low_rank.py").write_text(TESTS)
    found = runpy.run_path(str(path.parent / "test_low_rank.py"))
    tests = [test for name, test in found.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()
