import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from httpx import Response
from starlette.testclient import TestClient

from prefix_store.jobs import BUILT_IN_METHODS, JobError, JobStatus, TrainingJob
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from server.api import openai_views
from tests.server import artefacts
from tests.server.api.test_files import upload
from tests.server.conftest import Serve

JOBS = "/v1/fine_tuning/jobs"
CHAT = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
# of OpenAI's type, and `antefix`
FIELDS = {
    *("id", "object", "created_at", "error", "fine_tuned_model", "finished_at", "hyperparameters", "model"),
    *("organization_id", "result_files", "seed", "status", "trained_tokens", "training_file", "validation_file"),
    *("estimated_finish", "integrations", "metadata", "method", "antefix"),
}


@pytest.fixture
def data(client: TestClient) -> str:
    file_id: str = upload(client).json()["id"]
    return file_id


@pytest.fixture
def create(client: TestClient, data: str, frozen: FrozenModel) -> Callable[..., Response]:
    def post(headers: dict[str, str] | None = None, **body: Any) -> Response:
        return client.post(JOBS, json={"model": frozen.name, "training_file": data, **body}, headers=headers)

    return post


@pytest.fixture
def made(create: Callable[..., Response]) -> Callable[..., dict[str, Any]]:
    def ask(**body: Any) -> dict[str, Any]:
        reply = create(**body)
        assert reply.status_code == 200, reply.text
        job: dict[str, Any] = reply.json()
        return job

    return ask


def claimed(store: Store) -> TrainingJob:
    job = store.jobs.claim("w", 60.0)
    assert job is not None
    return job


def publish(store: Store, frozen: FrozenModel, job: TrainingJob, **more: Any) -> None:
    tensors = {"self.kv": artefacts.random_kv(frozen, 4)}
    store.prefixes.save(job.tenant, job.name, artefacts.manifest(frozen, 4), tensors, job=job, **more)


def ids(client: TestClient, path: str, **params: Any) -> list[str]:
    return [item["id"] for item in client.get(path, params=params).json()["data"]]


# create


def test_a_job_is_queued_and_shown_as_openai_shows_it(client: TestClient, made, data: str, frozen: FrozenModel) -> None:
    job = made(suffix="sums", metadata={"team": "a"}, user="passed over")
    assert set(job) == FIELDS
    assert (job["object"], job["status"], job["model"]) == ("fine_tuning.job", "queued", frozen.name)
    assert (job["training_file"], job["validation_file"], job["metadata"]) == (data, None, {"team": "a"})
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": 1.0}
    assert job["hyperparameters"] == auto
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": auto}}
    assert (job["organization_id"], job["seed"], job["result_files"], job["integrations"]) == ("default", 0, [], [])
    for absent in ("error", "fine_tuned_model", "finished_at", "trained_tokens", "estimated_finish"):
        assert job[absent] is None
    assert (job["antefix"]["prefix_id"], job["antefix"]["virtual_tokens"]) == ("sums", None)
    assert client.get(f"{JOBS}/{job['id']}").json() == job
    assert client.get(f"/v1/jobs/{job['id']}").json()["prefix_id"] == "sums"  # it is one of the others


def test_it_trains_on_what_the_files_hold(client: TestClient, store: Store, made, frozen: FrozenModel) -> None:
    judges = upload(client, b'{"text": "judge"}').json()["id"]
    job = made(validation_file=judges)
    assert job["validation_file"] == judges
    found = claimed(store)
    assert store.jobs.examples(found) == [{"prompt": "2+2=", "completion": "4"}, {"text": "ok"}]
    assert store.jobs.validation_examples(found) == [{"text": "judge"}]
    assert found.spec.base_digest == frozen.digest


HERE, IN_METHOD = "hyperparameters", "method.supervised.hyperparameters"


def _in_method(**hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}}


HYPER = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.7}


@pytest.mark.parametrize(
    "body",
    [
        {"hyperparameters": HYPER},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": HYPER}}},
        {"hyperparameters": HYPER, "method": {"type": "supervised", "supervised": {"hyperparameters": HYPER}}},
        {
            "hyperparameters": {"n_epochs": 3, "batch_size": "auto"},
            "method": {"supervised": {"hyperparameters": HYPER}},
        },
        {"antefix": {"epochs": 3, "batch_size": 2}, "hyperparameters": {"learning_rate_multiplier": 1.7}},
    ],
)
def test_hyperparameters_may_stand_in_either_place(store: Store, made, body: dict[str, Any]) -> None:
    assert made(**body)["hyperparameters"] == HYPER
    spec = claimed(store).spec
    assert (spec.epochs, spec.batch_size, "steps" in spec.unset) == (3, 2, True)
    assert spec.learning_rate == pytest.approx(0.17)


def test_a_multiplier_is_of_the_methods_own_rate(store: Store, made) -> None:
    job = made(hyperparameters={"learning_rate_multiplier": 0.5}, antefix={"method": "prompt"})
    assert job["hyperparameters"]["learning_rate_multiplier"] == 0.5
    assert claimed(store).spec.learning_rate == pytest.approx(0.15)


def test_prefix_options_stand_in_an_object_of_their_own(store: Store, made) -> None:
    options = {"method": "prefix", "virtual_tokens": 5, "steps": 7, "template": "{prompt}:", "init_text": "Hi"}
    job = made(seed=11, antefix=options)
    assert {name: job["antefix"][name] for name in options} == options
    assert (job["seed"], claimed(store).spec.seed) == (11, 11)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"model": ""}, "model", "at least 1 character"),
        ({"training_file": 3}, "training_file", "string"),
        ({"suffix": "My Model"}, "suffix", "suffix is what the prefix will be called"),
        ({"suffix": "tiny-llama"}, "suffix", "base model's name"),
        ({"suffix": ""}, "suffix", "suffix"),
        ({"seed": -1}, "seed", "seed must be"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"seed": 1, "antefix": {"seed": 2}}, "seed", "contradicts"),
        ({"metadata": {"a": 3}}, "metadata.a", "string"),
        ({"metadata": {"a": "x" * 513}}, "metadata", "at most 16"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "not supported"),
        ({"method": {"type": "dpo"}}, "method.type", "not supported"),
        ({"method": {"type": "supervised", "dpo": {"a": 1}}}, "method.dpo", "not supported"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "hyperparameters.n_epochs must be"),
        (_in_method(n_epochs=0), f"{IN_METHOD}.n_epochs", f"{IN_METHOD}.n_epochs must be"),
        ({"hyperparameters": {"n_epochs": "three"}}, "hyperparameters.n_epochs", "hyperparameters.n_epochs: Input"),
        (_in_method(n_epochs="three"), f"{IN_METHOD}.n_epochs", f"{IN_METHOD}.n_epochs: Input"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size", "hyperparameters.batch_size must be"),
        ({"antefix": {"batch_size": 257}}, "antefix.batch_size", "antefix.batch_size must be"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, f"{HERE}.learning_rate_multiplier", "greater than 0"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 1e9}},
            f"{HERE}.learning_rate_multiplier",
            "from 1e-06 to 100,",
        ),
        (_in_method(learning_rate_multiplier=1e-9), f"{IN_METHOD}.learning_rate_multiplier", "got 1e-09"),
        ({"hyperparameters": {"n_epochs": 2}, "antefix": {"steps": 5}}, f"{HERE}.n_epochs", f"or {HERE}.n_epochs say"),
        (
            {"hyperparameters": {"n_epochs": 2}, "antefix": {"epochs": 5}},
            f"{HERE}.n_epochs",
            "contradicts antefix.epochs",
        ),
        (
            {"hyperparameters": {"n_epochs": 2}, "method": {"supervised": {"hyperparameters": {"n_epochs": 3}}}},
            f"{IN_METHOD}.n_epochs",
            f"contradicts {HERE}.n_epochs",
        ),
        ({"virtual_tokens": 5}, "virtual_tokens", "belongs into the object `antefix`"),
        ({"antefix": {"stepz": 5}}, "antefix.stepz", "did you mean 'steps'"),
        ({"antefix": {"steps": "x", "seed": 1}}, "antefix.steps", "antefix.steps: Input"),
        ({"antefix": {"examples": []}}, "antefix.examples", "unknown field"),
        ({"antefix": {"virtual_tokens": 4000}}, "antefix.virtual_tokens", "leave no room"),
        ({"antefix": {"init_from": "No Name"}}, "antefix.init_from", "antefix.init_from: "),
        ({"antefix": {"method": "lora"}}, "antefix.method", "cannot be trained"),
        ({"antefix": 3}, "antefix", "antefix"),
    ],
)
def test_what_cannot_be_meant_is_400_and_named(client: TestClient, create, body, param: str, words: str) -> None:
    reply = create(**body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
    assert client.get(JOBS).json()["data"] == []


def test_auto_and_null_are_as_good_as_absent(made) -> None:
    auto = dict.fromkeys(HYPER, "auto")
    job = made(hyperparameters=auto, suffix=None, seed=None, validation_file=None, metadata=None, integrations=None)
    assert job["hyperparameters"]["n_epochs"] == "auto"
    assert job["antefix"]["prefix_id"].startswith("ft-")
    assert job["antefix"]["prefix_id"] != made()["antefix"]["prefix_id"]


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_file_that_is_missing_and_one_of_another_are_the_same(
    client: TestClient, create, store: Store, field: str
) -> None:
    admin, _ = store.keys.create("default", ["admin"])
    key, _ = store.keys.create("other", ["train"])
    foreign = upload(client, headers={"authorization": f"Bearer {key}"}).json()["id"]
    missing = "file-" + "0" * 27
    allowed = {"authorization": f"Bearer {admin}", "x-request-id": "same"}
    replies = [create(allowed, **{field: name}) for name in (foreign, missing)]
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, field)
    assert replies[0].text.replace(foreign, missing) == replies[1].text
    assert replies[0].headers == replies[1].headers


def test_a_model_that_is_a_prefix_is_what_the_next_one_starts_from(
    client: TestClient, create, made, store: Store, frozen: FrozenModel
) -> None:
    file = artefacts.native(frozen, 6)
    client.put("/v1/prefixes/support/content", content=file)
    for model in ("support", "support@1", "default/support"):
        job = made(model=model)
        assert (job["model"], job["antefix"]["virtual_tokens"]) == ("default/support@1", 6)
        assert claimed(store).spec.init_from == "default/support@1"
    reply = create(model="support", antefix={"init_from": "support"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "antefix.init_from")
    reply = create(model="support", antefix={"method": "prompt"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
    for model in ("gpt-4o", "nothing", "other/support"):
        reply = create(model=model)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


# The kinds that there are, and the methods that go on from each.
KINDS: dict[str, tuple[Callable[..., bytes], set[str]]] = {
    "kv": (artefacts.native, {"prefix", "prefix_mlp"}),
    "embeds": (artefacts.prompt, {"prompt", "prompt_mlp", "prompt_lstm"}),
    "memory": (artefacts.memory, {"prefix_plus"}),
}


@pytest.mark.parametrize("method", BUILT_IN_METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_to_start_from_is_of_the_methods_kind_or_refused_at_once(
    client: TestClient, create, frozen: FrozenModel, kind: str, method: str
) -> None:
    make, able = KINDS[kind]
    client.put("/v1/prefixes/support/content", content=make(frozen))
    for body, param in (
        ({"model": "support", "antefix": {"method": method}}, "model"),
        ({"antefix": {"method": method, "init_from": "support"}}, "antefix.init_from"),
    ):
        reply = create(**body)
        if method in able:
            assert reply.status_code == 200, reply.text
        else:
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, param)
            assert error["message"].startswith(f"{param}: method {method} starts from a prefix of method ")
            assert "default/support@1 is one of" in error["message"]


def test_a_prefix_to_start_from_must_fit_the_model_when_it_is_asked_for(
    client: TestClient, create, store: Store, frozen: FrozenModel
) -> None:
    elsewhere = dataclasses.replace(frozen, digest="0" * 64)
    wide = dataclasses.replace(frozen.geometry, hidden_size=8)
    client.put("/v1/prefixes/gelu/content", content=artefacts.memory(frozen, feature_map="gelu"))
    tensors = {"self.kv": artefacts.random_kv(frozen, 4)}
    for name, made in {
        "elsewhere": artefacts.manifest(elsewhere, 4),
        "another": dataclasses.replace(artefacts.manifest(frozen, 4), geometry=wide, base_digest=None),
        "early": artefacts.manifest(frozen, 4, position_offset=0),
    }.items():
        store.prefixes.save("default", name, made, tensors)
    for model, said, options in (
        ("elsewhere", "made for another base model", {}),
        ("another", "does not fit this model", {}),
        ("early", "expected position_offset 4, it has 0", {}),
        ("gelu", "expected feature_map elu, it has gelu", {"method": "prefix_plus"}),
    ):
        reply = create(model=model, antefix=options)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (400, "prefix_mismatch", "model")
        assert error["message"].startswith(f"model: default/{model}@1: ")
        assert said in error["message"]
    assert create(model="gelu", antefix={"method": "prefix_plus", "feature_map": "gelu"}).status_code == 200


def test_messages_need_a_chat_template(serve: Serve, store: Store, frozen: FrozenModel) -> None:
    client = serve()
    chat = upload(client, CHAT).json()["id"]
    body = {"model": frozen.name, "training_file": chat}
    reply = client.post(JOBS, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "chat_template_missing", "training_file")
    assert serve(chat_template="{{ x }}").post(JOBS, json=body).status_code == 200
    assert claimed(store).spec.chat_template == "{{ x }}"


def test_a_request_that_is_repeated_is_one_job(client: TestClient, create, data: str) -> None:
    headers = {"idempotency-key": "k"}
    first = create(headers)
    client.delete(f"/v1/files/{data}")
    again = create(headers)
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert create(headers, seed=3).status_code == 422
    assert ids(client, JOBS) == [first.json()["id"]]


# watch


def test_jobs_are_paged_and_filtered(client: TestClient, made) -> None:
    notes = [{}, {"team": "a"}, {"team": "b"}, {"team": "a", "kind": "x"}]
    newest = [made(metadata=note)["id"] for note in notes][::-1]
    assert ids(client, JOBS) == newest
    page = client.get(JOBS, params={"limit": 3}).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == (newest[:3], True)
    assert ids(client, JOBS, limit=3, after=newest[2]) == newest[3:]
    assert ids(client, JOBS, **{"metadata[team]": "a"}) == [newest[0], newest[2]]
    assert ids(client, JOBS, **{"metadata[team]": "a"}, limit=1, after=newest[0]) == [newest[2]]
    assert ids(client, JOBS, **{"metadata[team]": "a", "metadata[kind]": "x"}) == [newest[0]]
    assert ids(client, JOBS, metadata="null") == [newest[3]]
    assert client.get(JOBS, params={"limit": 0}).status_code == 400


def test_a_job_of_the_other_route_is_shown_too(client: TestClient) -> None:
    job = client.post("/v1/prefixes/sums/train", json={"examples": [{"text": "a"}]}).json()["job"]["id"]
    shown = client.get(f"{JOBS}/{job}").json()
    assert set(shown) == FIELDS
    assert (shown["training_file"], shown["validation_file"], shown["metadata"]) == ("", None, {})
    assert ids(client, JOBS) == [job]


def test_every_state_has_openais_name(client: TestClient, made, store: Store) -> None:
    def status(verb: str = "") -> str:
        reply = client.post(f"{JOBS}/{job}/{verb}") if verb else client.get(f"{JOBS}/{job}")
        assert reply.status_code == 200, reply.text
        return str(reply.json()["status"])

    job = made()["id"]
    assert [status(), status("pause"), status("resume"), status("cancel")] == [
        *("queued", "paused", "queued", "cancelled")
    ]
    job = made()["id"]
    running = claimed(store)
    assert status() == status("pause") == status("resume") == status("cancel") == "running"
    store.jobs.finish(running, JobStatus.QUEUED, None)
    assert status() == "cancelled"
    for verb in ("cancel", "pause", "resume"):
        reply = client.post(f"{JOBS}/{job}/{verb}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "conflict")
        reply = client.post(f"{JOBS}/ftjob-none/{verb}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "job_not_found")


def test_a_running_job_says_when_it_should_be_done(client: TestClient, made, store: Store) -> None:
    job = made()
    store.jobs.heartbeat(claimed(store), 60.0, {"step": 3, "seconds_left": 100.0, "trained_tokens": 9})
    shown = client.get(f"{JOBS}/{job['id']}").json()
    assert 90 <= shown["estimated_finish"] - job["created_at"] <= 200
    assert shown["trained_tokens"] is None


def test_a_failed_job_says_why(client: TestClient, made, store: Store) -> None:
    job = made()
    store.jobs.finish(claimed(store), JobStatus.FAILED, JobError("training_diverged", "the loss became nan"))
    shown = client.get(f"{JOBS}/{job['id']}").json()
    assert shown["status"] == "failed"
    assert shown["error"] == {"code": "training_diverged", "message": "the loss became nan", "param": None}
    assert (shown["fine_tuned_model"], shown["result_files"]) == (None, [f"file-{job['id']}"])
    assert shown["finished_at"] >= shown["created_at"]
    assert client.get(f"{JOBS}/{job['id']}/checkpoints").json()["data"] == []


def test_a_job_that_succeeded_names_what_it_made(client: TestClient, made, store: Store, frozen: FrozenModel) -> None:
    job = made(suffix="sums")
    running = claimed(store)
    store.jobs.heartbeat(running, 60.0, {"step": 20, "trained_tokens": 1234})
    for step in (10, 20):
        store.jobs.add_event(running, "metrics", {"step": step, "train_loss": 10 / step, "valid_loss": 1.0 + step})
    store.jobs.add_event(running, "message", {"message": "kept", "kept": {"step": 10, "valid_loss": 11.0}})
    publish(store, frozen, running)
    client.put("/v1/prefixes/sums/content", content=artefacts.native(frozen, 3))  # what comes later is not its
    shown = client.get(f"{JOBS}/{job['id']}").json()
    assert (shown["status"], shown["fine_tuned_model"], shown["trained_tokens"]) == ("succeeded", "sums@1", 1234)
    page = client.get(f"{JOBS}/{job['id']}/checkpoints").json()
    (checkpoint,) = page["data"]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, checkpoint["id"], checkpoint["id"])
    assert set(checkpoint) == {
        *("id", "object", "created_at", "fine_tuned_model_checkpoint", "fine_tuning_job_id", "metrics", "step_number"),
    }
    assert checkpoint["id"].startswith("ftckpt-")
    assert (checkpoint["fine_tuned_model_checkpoint"], checkpoint["step_number"]) == ("sums@1", 10)
    assert checkpoint["metrics"] == {"step": 10, "train_loss": 1.0, "valid_loss": 11.0, "full_valid_loss": 11.0}
    assert ids(client, f"{JOBS}/{job['id']}/checkpoints", after=checkpoint["id"]) == []
    store.prefixes.delete(PrefixRef("default", "sums", 1))
    assert ids(client, f"{JOBS}/{job['id']}/checkpoints") == []


def test_events_are_openais_newest_first(client: TestClient, made, store: Store) -> None:
    job = made()
    path = f"{JOBS}/{job['id']}/events"
    assert ids(client, path) == []
    running = claimed(store)
    store.jobs.add_event(running, "message", {"message": "training on 2 examples", "chosen": {"steps": 4}})
    step = {"step": 2, "total_steps": 4, "train_loss": 0.51234, "valid_loss": 0.25}
    store.jobs.add_event(running, "metrics", step)
    store.jobs.add_event(running, "metrics", step | {"step": 4, "valid_loss": None})
    store.jobs.add_event(running, "samples", {"samples": []})
    samples, last, metrics, message = client.get(path).json()["data"]
    assert set(message) == {"id", "object", "created_at", "level", "message", "type", "data"}
    assert (message["object"], message["level"], message["type"]) == ("fine_tuning.job.event", "info", "message")
    assert message["message"] == "training on 2 examples"
    assert (metrics["type"], metrics["data"]) == ("metrics", step)
    assert metrics["message"] == "Step 2/4: training loss=0.5123, validation loss=0.2500"
    assert last["message"] == "Step 4/4: training loss=0.5123"
    assert (samples["type"], samples["message"]) == ("message", openai_views.SAMPLES)
    names = [event["id"] for event in (samples, last, metrics, message)]
    assert len(set(names)) == 4
    assert all(name.startswith("ftevent-") for name in names)
    assert ids(client, path, limit=3) == names[:3]
    assert ids(client, path, limit=3, after=names[2]) == names[3:]
    assert ids(client, path, after=names[3]) == []
    other = made()["id"]
    foreign = f"ftevent-{other.removeprefix('ftjob-')}-3"
    for odd in (foreign, "ftevent-3", "ftevent-x", "3", names[0][:-1] + "0", names[0] + "9" * 5000):
        reply = client.get(path, params={"after": odd})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "after")
