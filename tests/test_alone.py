"""Engine, store and training loop do their work where only torch and transformers are installed."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests import alone

# What needs the packages that are left out: HTTP, Redis, the command line, the worker's settings and metrics.
NEEDY = {
    *("prefix_store.backends.redis", "prefix_store.backends.redis_blobs", "prefix_store.backends.redis_client"),
    *("trainer.__main__", "trainer.metrics", "trainer.settings"),
}
TRAIN_KEEP_SERVE = """
import json
from collections import defaultdict
from server.engine.engine import Engine
from server.engine.prefix_loader import PrefixLoader
from server.scheduler.messages import GenerationRequest
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Limits
from prefix_store.store import Store
from tests.models import tiny_frozen, tiny_tokenizer
from tests.trainer.runs import EXAMPLES, make
from trainer import data, training_model
from trainer.step import step

others = data.tokenize(tiny_tokenizer(), [{"prompt": "what", "completion": "ever" * 4}] * 4, 48)
tunings = [make(EXAMPLES), make(others)]
shared = training_model.attach(tiny_frozen("llama"))
losses = [step(shared, tunings) for _ in range(10)]
store = Store.open("sqlite:///FOLDER/store.db")
frozen = tiny_frozen("llama")
loader = PrefixLoader(store.prefixes, frozen, 1 << 20)
prefixes = [
    loader.load(store.prefixes.save("acme", f"p{number}", one.method.manifest(), one.result().tensors)).payload
    for number, one in enumerate(tunings)
]
engine = Engine(frozen, Limits(slots=512, rows=4, step_tokens=64, context_length=128, waiting=8))

def serve(*asked):
    for number in asked:
        params = SamplingParams(max_tokens=8, temperature=0.8 if number == 2 else 0.0, ignore_eos=True)
        engine.scheduler.add(GenerationRequest(str(number), "", (5, 6, 7), params, prefixes[number % 2]), seed=number)
    tokens, rows = defaultdict(list), []
    while engine.scheduler.running or engine.scheduler.waiting:
        events = engine.step()
        rows.append(len(events))
        for event in events:
            assert event.error is None, event.error
            tokens[event.request_id].extend(event.token_ids)
    return tokens, max(rows)

mixed, rows = serve(0, 1, 2)
alone = {name: found for number in range(3) for name, found in serve(number)[0].items()}
print(json.dumps({"losses": losses, "rows": rows, "mixed": mixed, "alone": alone}))
"""
IMPORT_ALL = """
import importlib, pkgutil
failed = []
for package in ("server.engine", "server.scheduler", "prefix_store", "trainer"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".", onerror=failed.append):
        if found.name.startswith("prefix_store.cli") or found.name.endswith("triton_kernels"):
            continue
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError:
            failed.append(found.name)
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the process said: of prefixes that it trained and served, and of modules that it could not import."""
    folder = tmp_path_factory.mktemp("alone")
    return alone.run(folder, TRAIN_KEEP_SERVE.replace("FOLDER", str(folder)) + IMPORT_ALL)


def test_all_that_serves_and_trains_imports(printed):
    assert set(json.loads(printed[1])) == NEEDY


@pytest.mark.parametrize("package", alone.BLOCKED)
def test_what_is_left_out_is_left_out(package, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        alone.run(tmp_path, f"import {package}")
    assert f"ModuleNotFoundError: No module named '{package}'" in caught.value.stderr


def test_prefixes_are_trained_together_kept_and_served_in_one_batch(printed):
    found = json.loads(printed[0])
    assert all(last < 0.9 * first for first, last in zip(found["losses"][0], found["losses"][-1], strict=True))
    assert found["rows"] == 3
    assert found["mixed"] == found["alone"]
    assert all(len(tokens) == 8 for tokens in found["mixed"].values())
    assert found["mixed"]["0"] != found["mixed"]["1"]
