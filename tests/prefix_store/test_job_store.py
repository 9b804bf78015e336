import re

import pytest

from prefix_store.errors import (
    InvalidName,
    InvalidRequest,
    InvalidTrainingData,
    PrefixNotFound,
    QuotaExceeded,
    StoreCorrupt,
)
from prefix_store.jobs import JobStatus, Objective, TrainingSpec
from tests.prefix_store.samples import LENGTH, damage, manifest, tensors

EXAMPLES = [
    {"prompt": "Grüße\u2028", "completion": "two\nlines"},
    {"completion": " ", "prompt": ""},
]


@pytest.fixture
def jobs(store):
    return store.jobs


def test_submitting_queues_a_job(jobs):
    job = jobs.submit("acme", "support", EXAMPLES, {"steps": 7, "method": "prefix", "objective": "lm"})
    assert re.fullmatch(r"ftjob-[A-Za-z0-9]{24}", job.id)
    assert job == jobs.job("acme", job.id)
    assert (job.status, job.tenant, job.name) == (JobStatus.QUEUED, "acme", "support")
    unset = ("virtual_tokens", "batch_size", "max_length")
    assert job.spec == TrainingSpec(job.spec.data_digest, 2, "prefix", Objective.LM, steps=7, unset=unset)


def test_examples_come_back_as_they_were(jobs):
    assert jobs.examples(jobs.submit("acme", "support", EXAMPLES, {})) == EXAMPLES


def test_equal_examples_are_kept_once(jobs):
    first = jobs.submit("acme", "support", EXAMPLES, {})
    reordered = [dict(reversed(example.items())) for example in EXAMPLES]
    second = jobs.submit("acme", "support", reordered, {})
    assert first.spec.data_digest == second.spec.data_digest
    assert first.id != second.id


def test_damaged_examples_are_noticed(store, jobs):
    job = jobs.submit("acme", "support", EXAMPLES, {})
    damage(store, job.spec.data_digest, b"{}\n")
    with pytest.raises(StoreCorrupt):
        jobs.examples(job)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "a", "completion": ""}, "line 2: completion is empty"),
        ({"prompt": "a"}, "line 2: expected an object .* got an object with 'prompt'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: no message of an assistant"),
    ],
)
def test_bad_examples_are_refused_by_line(store, jobs, example, message):
    with pytest.raises(InvalidTrainingData, match=message):
        jobs.submit("acme", "support", [EXAMPLES[0], example], {})
    with pytest.raises(InvalidTrainingData, match=f"validation_examples, {message}"):
        jobs.submit("acme", "support", EXAMPLES, {}, validation=[EXAMPLES[0], example])
    assert jobs.jobs("acme", None, 10) == []
    assert list(store.blobs.digests()) == []


def test_examples_to_judge_by_are_kept_behind_those_to_learn_from(store, jobs):
    judges = [{"text": "a"}, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    job = jobs.submit("acme", "support", EXAMPLES, {}, validation=judges)
    assert (job.spec.examples, job.spec.validation_examples) == (2, 2)
    assert (jobs.examples(job), jobs.validation_examples(job)) == (EXAMPLES, judges)
    assert jobs.validation_examples(jobs.submit("acme", "support", EXAMPLES, {})) == []
    assert len(list(store.blobs.digests())) == 2


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"stepz": 1}, "stepz"),
        ({"data_digest": "a"}, "data_digest"),
        ({"examples": 9}, "examples"),
        ({"validation_examples": 9}, "validation_examples"),
        ({"unset": ["steps"]}, "unset"),
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"method": "lora"}, "method"),
        ({"method": ["prefix"]}, "method"),
        ({"objective": "win"}, "objective"),
        ({"init_text": 1}, "init_text"),
        ({"method": "prefix_minus"}, "method"),
        ({"objective": ["lm"]}, "objective"),
        ({"objective": "distil"}, "context"),
        ({"context": "a text"}, "context"),
        ({"method": "prefix_plus", "virtual_tokens": 4}, "virtual_tokens"),
        ({"method": "prefix_plus", "init_text": "a"}, "init_text"),
        ({"method": "prompt", "frozen_tokens": 0}, "frozen_tokens"),
        ({"bottleneck": 8}, "bottleneck"),
        ({"method": "prompt", "stacks": ["self"]}, "stacks"),
        ({"stacks": ["middle"]}, "stacks"),
        ({"method": "prefix_mlp", "feature_map": "gelu"}, "feature_map"),
        ({"init_from": "No Name"}, "init_from"),
        ({"init_from": 3}, "init_from"),
    ],
)
def test_bad_options_are_refused_by_name(jobs, options, field):
    with pytest.raises(InvalidRequest) as caught:
        jobs.submit("acme", "support", EXAMPLES, options)
    assert caught.value.param == field
    assert field in caught.value.message


def test_a_run_is_as_long_as_steps_or_epochs_say(jobs):
    job = jobs.submit("acme", "support", EXAMPLES, {"epochs": 3})
    assert (job.spec.epochs, "steps" in job.spec.unset) == (3, True)
    assert jobs.job("acme", job.id) == job
    for epochs in (0, 10_001, 1.5, True, "3"):
        with pytest.raises(InvalidRequest, match="epochs must be a whole number from 1 to 10000"):
            jobs.submit("acme", "support", EXAMPLES, {"epochs": epochs})
    with pytest.raises(InvalidRequest, match="give one of them"):
        jobs.submit("acme", "support", EXAMPLES, {"epochs": 3, "steps": 3})


def test_what_a_job_is_about_stays_with_it(jobs):
    about = {"training_file": "file-a", "validation_file": "file-b", "metadata": {"team": "Grüße"}}
    job = jobs.submit("acme", "support", EXAMPLES, {}, about=about)
    found = jobs.job("acme", job.id)
    assert {name: getattr(found, name) for name in about} == about
    plain = jobs.submit("acme", "support", EXAMPLES, {})
    assert (plain.training_file, plain.validation_file, plain.metadata) == (None, None, {})
    with pytest.raises(InvalidRequest, match="metadata must be at most 16"):
        jobs.submit("acme", "support", EXAMPLES, {}, about={"metadata": dict.fromkeys(map(str, range(17)), "")})


def test_jobs_that_are_wanted_are_found_behind_those_that_are_not(jobs):
    made = [jobs.submit("acme", "ab"[number % 2], EXAMPLES, {}).id for number in range(9)][::-1]
    wanted = made[1::2]
    for limit in (1, 2, 4, 9):
        found, after = [], None
        while page := jobs.jobs("acme", after, limit, lambda job: job.name == "b"):
            assert len(page) <= limit
            found += [job.id for job in page]
            after = found[-1]
        assert found == wanted
    assert jobs.jobs("acme", None, 9, lambda job: False) == []


def test_events_come_oldest_first_or_newest_first(jobs):
    jobs.submit("acme", "support", EXAMPLES, {})
    job = jobs.claim("w", 60.0)
    for number in range(5):
        jobs.add_event(job, "message", {"message": str(number)})

    def page(after, limit, **order):
        return [event.sequence for event in jobs.events("acme", job.id, after, limit, **order)]

    assert (page(0, 2), page(2, 9), page(5, 9)) == ([1, 2], [3, 4, 5], [])
    assert page(0, 2, newest_first=True) == [5, 4]
    assert page(4, 9, newest_first=True) == [3, 2, 1]
    assert page(1, 9, newest_first=True) == []
    assert jobs.events("other", job.id, 0, 9, newest_first=True) == []


def test_a_method_may_be_any_that_the_caller_allows(jobs):
    assert jobs.submit("acme", "support", EXAMPLES, {"method": "prompt"}).spec.method == "prompt"
    with pytest.raises(
        InvalidRequest, match=r"^method 'low_rank' cannot be trained; what can: prefix, .*, prefix_plus"
    ):
        jobs.submit("acme", "support", EXAMPLES, {"method": "low_rank"})
    allowed = jobs.submit("acme", "support", EXAMPLES, {"method": "low_rank"}, methods=["prefix", "low_rank"])
    assert jobs.job("acme", allowed.id).spec.method == "low_rank"


def test_a_method_s_own_default_is_one_that_the_job_may_change(jobs):
    assert jobs.submit("acme", "support", EXAMPLES, {"method": "prompt"}).spec.learning_rate == 0.3
    asked = {"method": "prompt", "learning_rate": 0.2}
    assert jobs.submit("acme", "support", EXAMPLES, asked).spec.learning_rate == 0.2


def test_a_memory_has_no_virtual_tokens(jobs):
    assert jobs.submit("acme", "support", EXAMPLES, {"method": "prefix_plus"}).spec.virtual_tokens == 0


def test_a_plugged_in_method_may_use_any_option(jobs):
    options = {"method": "low_rank", "bottleneck": 2, "feature_map": "gelu", "frozen_tokens": 3}
    spec = jobs.submit("acme", "support", EXAMPLES, options, methods=["low_rank"]).spec
    assert {name: getattr(spec, name) for name in options} == options


def test_a_prefix_to_start_from_is_named_for_good_and_lends_its_length(store, jobs):
    for _ in range(2):
        of = manifest()
        store.prefixes.save("acme", "first", of, tensors(of))
    spec = jobs.submit("acme", "support", EXAMPLES, {"init_from": "first"}).spec
    assert (spec.init_from, spec.virtual_tokens) == ("acme/first@2", LENGTH)
    spec = jobs.submit("acme", "support", EXAMPLES, {"init_from": "first@1", "virtual_tokens": LENGTH}).spec
    assert (spec.init_from, spec.virtual_tokens) == ("acme/first@1", LENGTH)
    with pytest.raises(InvalidRequest, match=f"has its {LENGTH} virtual tokens, not 7") as caught:
        jobs.submit("acme", "support", EXAMPLES, {"init_from": "first@1", "virtual_tokens": 7})
    assert caught.value.param == "virtual_tokens"


def test_a_prefix_to_start_from_must_be_the_tenant_s_to_use(store, jobs):
    of = manifest()
    store.prefixes.save("other", "secret", of, tensors(of))
    for asked in ("absent", "other/secret"):
        with pytest.raises(PrefixNotFound) as caught:
            jobs.submit("acme", "support", EXAMPLES, {"init_from": asked})
        assert caught.value.param == "init_from"
    assert jobs.jobs("acme", None, 10) == []


def test_a_text_that_is_no_unicode_is_kept_as_it_came(jobs):
    job = jobs.submit("acme", "support", EXAMPLES, {"init_text": "\ud800"})
    assert jobs.job("acme", job.id).spec.init_text == "\ud800"


def test_a_job_over_the_quota_is_refused_and_leaves_no_hold(store, jobs):
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"jobs": 0})
    with pytest.raises(QuotaExceeded):
        jobs.submit("acme", "support", EXAMPLES, {})
    assert store.collect() == 1


def test_no_examples_are_refused(jobs):
    with pytest.raises(InvalidRequest, match="at least one example"):
        jobs.submit("acme", "support", [], {})


@pytest.mark.parametrize(("tenant", "name"), [("acme", "Support"), ("A", "support")])
def test_illegal_names_are_refused(jobs, tenant, name):
    with pytest.raises(InvalidName):
        jobs.submit(tenant, name, EXAMPLES, {})


def test_a_job_runs_through_the_backends_verbs(jobs):
    submitted = jobs.submit("acme", "support", EXAMPLES, {})
    job = jobs.claim("w", 60.0)
    assert job.id == submitted.id
    jobs.add_event(job, "message", {"message": "started"})
    assert not jobs.heartbeat(job, 60.0, {"step": 1}).cancel_requested
    jobs.request_cancel("acme", job.id)
    assert jobs.finish(job, JobStatus.CANCELLED, None).status is JobStatus.CANCELLED
    assert [event.kind for event in jobs.events("acme", job.id, 0, 10)] == ["message"]
    assert [listed.id for listed in jobs.jobs("acme", None, 10)] == [job.id]
    assert jobs.job_counts()[JobStatus.CANCELLED] == 1
