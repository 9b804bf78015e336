"""A real server over real HTTP. The tests share one; the last kills it, and goes on with what is left of its store."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefix_store import codec
from prefix_store.formats import peft
from prefix_store.model.frozen import FrozenModel, load
from tests.e2e.processes import SERVE_WITH_WORKER, SERVER, Running
from tests.models import save_tiny, tiny_frozen
from tests.server import artefacts

pytestmark = pytest.mark.slow
GREEDY = {"prompt": "Once upon", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def frozen(model: Path) -> FrozenModel:
    return load(model)


@pytest.fixture(scope="module")
def settings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("run")
    return {"MODEL": str(model), "STORE": f"sqlite:///{folder}/store.db", "KV_SLOTS": "4096", "MAX_UPLOAD_MB": "8"}


@pytest.fixture(scope="module")
def server(
    settings: dict[str, str], frozen: FrozenModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    running = Running.start(tmp_path_factory.mktemp("server"), *SERVER, **settings)
    try:
        upload(running.client, "native", artefacts.native(frozen, 6, seed=1)).raise_for_status()
        upload(running.client, "adapter", artefacts.adapter(frozen, 9, seed=2)[peft.TENSORS_FILE]).raise_for_status()
        yield running
    finally:
        running.close()


@pytest.fixture
def client(server: Running) -> httpx.Client:
    return server.client


def upload(client: httpx.Client, name: str, file: bytes) -> httpx.Response:
    return client.post("/v1/prefixes", data={"id": name}, files={"file": ("f", file)})


def generate(client: httpx.Client, prefix: str | None = None, **changes: Any) -> dict[str, Any]:
    reply = client.post("/generate", json={**GREEDY, "prefix_id": prefix, **changes})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def gauge(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def test_the_start_tells_what_is_served_and_what_to_try(server: Running) -> None:
    said = server.log.read_text()
    for part in ("loading the model", "self-test", "tiny, float32 on cpu", "open mode, one tenant", "curl -s http://"):
        assert part in said


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(client: httpx.Client) -> None:
    prefixes = ["native", "adapter", None]
    alone = [generate(client, prefix)["text"] for prefix in prefixes]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(12) as pool:
        mixed = list(pool.map(lambda index: generate(client, prefixes[index % 3])["text"], range(12)))
    assert mixed == alone * 4


def test_memories_run_beside_prefixes_of_other_methods(client: httpx.Client, frozen: FrozenModel) -> None:
    for feature_map in ("elu", "gelu"):
        upload(client, feature_map, artefacts.memory(frozen, feature_map=feature_map)).raise_for_status()
    prefixes = ["native", "elu", "gelu", None]
    alone = [generate(client, prefix) for prefix in prefixes]
    assert len({reply["text"] for reply in alone}) == 4
    assert [reply["usage"]["virtual_tokens"] for reply in alone] == [6, 0, 0, 0]
    with ThreadPoolExecutor(12) as pool:
        mixed = list(pool.map(lambda index: generate(client, prefixes[index % 4])["text"], range(12)))
    assert mixed == [reply["text"] for reply in alone] * 3
    for feature_map in ("elu", "gelu"):
        assert client.delete(f"/v1/prefixes/{feature_map}").status_code == 200


def test_a_stream_joins_to_the_whole_text(client: httpx.Client) -> None:
    whole = generate(client, "native")
    with client.stream("POST", "/generate", json={**GREEDY, "prefix_id": "native", "stream": True}) as reply:
        *lines, done = [line for line in reply.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert done == "data: [DONE]"
    assert "".join(event["text"] for event in events) == whole["text"]
    assert (events[-1]["prefix"], events[-1]["usage"]) == (whole["prefix"], whole["usage"])


def test_seeds_stops_and_logprobs(client: httpx.Client) -> None:
    drawn = [generate(client, "native", temperature=1.0, seed=seed)["text"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    several = generate(client, "native", temperature=1.0, seed=1, n=2)["choices"]
    assert [choice["text"] for choice in several] == [drawn[0], drawn[2]]
    text = generate(client)["text"]
    assert generate(client, stop=text[5:7])["text"] == text[: text.index(text[5:7])]
    logprobs = generate(client, logprobs=3, echo=True)["logprobs"]
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert {len(top) for top in logprobs["top_logprobs"][1:]} <= {3, 4}


def test_a_client_that_leaves_frees_its_place(client: httpx.Client) -> None:
    body = {**GREEDY, "max_tokens": 480, "n": 16}
    with client.stream("POST", "/generate", json={**body, "stream": True}) as reply:
        next(reply.iter_bytes())
    with pytest.raises(httpx.ReadTimeout):
        client.post("/generate", json=body, timeout=0.2)
    deadline = time.monotonic() + 10
    while gauge(client, "antefix_num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert gauge(client, 'antefix_request_success_total{finished_reason="abort"}') == 32


def test_bad_input_is_refused_and_harms_nobody(client: httpx.Client, frozen: FrozenModel) -> None:
    before = generate(client, "native")["text"]
    misspelt = client.post("/generate", json={"prompt": "x", "prefixid": "native"})
    too_long = client.post("/generate", json={**GREEDY, "prefix_id": "native", "max_tokens": 600})
    refused = [
        misspelt,
        too_long,
        client.post("/generate", json={"prompt": "x", "prefix_id": "nothing"}),
        upload(client, "foreign", artefacts.native(tiny_frozen("qwen3"))),
        upload(client, "foreign", artefacts.adapter(tiny_frozen("gpt2"))[peft.TENSORS_FILE]),
        upload(client, "large", bytes(9 << 20)),
        *(upload(client, "damaged", data) for data in artefacts.damaged(frozen).values()),
    ]
    assert {reply.status_code for reply in refused} == {400, 404, 413}
    assert all(set(reply.json()["error"]) == {"message", "type", "param", "code"} for reply in refused)
    assert "did you mean 'prefix_id'" in misspelt.json()["error"]["message"]
    message = too_long.json()["error"]["message"]
    assert "This model's maximum context length is 512" in message
    assert all(number in message for number in ("6 of the prefix", "10 of the prompt", "600 of max_tokens"))
    assert {item["id"] for item in client.get("/v1/prefixes").json()["data"]} == {"native", "adapter"}
    assert generate(client, "native")["text"] == before


def test_killed_during_uploads_it_starts_again_with_whole_prefixes_and_stops_at_one_signal(
    server: Running, settings: dict[str, str], frozen: FrozenModel, tmp_path: Path
) -> None:
    before = generate(server.client, "adapter")["text"]
    kill_during_uploads(server, [artefacts.native(frozen, 200, seed=seed) for seed in range(4)])
    again = Running.start(tmp_path, *SERVE_WITH_WORKER, **settings)
    try:
        stored = again.client.get("/v1/prefixes", params={"limit": 1000}).json()["data"]
        assert len(stored) > 2
        for item in stored:
            file = again.client.get(f"/v1/prefixes/{item['id']}/export").content
            assert codec.digest_of(file) == item["digest"]
        assert generate(again.client, "adapter")["text"] == before
        with again.client.stream(
            "POST", "/generate", json={**GREEDY, "max_tokens": 480, "n": 64, "stream": True}
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            status, seconds = again.stop(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    finally:
        again.close()
    assert (status, seconds < 5) == (0, True), again.log.read_text()


def kill_during_uploads(server: Running, files: list[bytes]) -> None:
    """Four clients that do nothing but upload, and SIGKILL after a second."""
    stopped = threading.Event()

    def work(number: int) -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=10) as client:
            for count in range(10_000):
                try:
                    upload(client, f"many-{number}-{count}", files[number])
                except httpx.HTTPError:
                    return
                if stopped.is_set():
                    return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(files))]
    for thread in threads:
        thread.start()
    time.sleep(1)
    server.stop(signal.SIGKILL)
    stopped.set()
    for thread in threads:
        thread.join()
