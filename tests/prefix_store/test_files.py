"""Uploaded files, on every backend."""

import re

import pytest

from prefix_store.codec import digest_of
from prefix_store.errors import (
    InvalidName,
    InvalidRequest,
    InvalidTrainingData,
    NoSuchFile,
    QuotaExceeded,
    StoreCorrupt,
    StoreUnavailable,
)
from prefix_store.files import ID, LONGEST_NAME
from prefix_store.holds import HOLD_SECONDS
from tests.prefix_store import invariants
from tests.prefix_store.samples import damage, manifest, tensors, upload

DATA = b'{"prompt": "Gr\xc3\xbc\xc3\x9fe", "completion": "two"}\n\n{"text": "a"}'
OTHER = b'{"text": "b"}\n'
MISSING = "file-" + "0" * 27


@pytest.fixture
def files(store):
    return store.files


def test_a_file_is_kept_as_it_came(store, files):
    made = upload(store, DATA, filename="examples.jsonl")
    assert ID.fullmatch(made.id)
    assert (made.tenant, made.filename, made.purpose) == ("acme", "examples.jsonl", "fine-tune")
    assert (made.digest, made.size_bytes, made.created_at) == (digest_of(DATA), len(DATA), 1000.0)
    assert files.find("acme", made.id) == made
    assert files.read(made) == DATA
    assert list(store.blobs.digests()) == [digest_of(DATA)]
    invariants.check(store.backend)


@pytest.mark.parametrize("file_id", [MISSING, "", "file-", "../x", "file-" + "é" * 27, "x" * 300])
def test_what_is_not_there_and_what_is_anothers_is_missing(store, files, file_id):
    foreign = upload(store, DATA, tenant="other")
    for name in (file_id, foreign.id):
        for verb in (files.find, files.delete):
            with pytest.raises(NoSuchFile, match=re.escape(repr(name[:80]))):
                verb("acme", name)
    assert files.page("acme", None, 10) == []
    assert files.read(foreign) == DATA


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file has no examples"),
        (b"\n \n", "the file has no examples"),
        (b"no json", r"^line 1: not JSON"),
        (
            b'{"text": "a"}\n\n{"text": 3}\n{"txt": "a"}\n',
            r"^line 3: text must be a text.*; line 4: expected an object",
        ),
        (b'{"text": "\xff"}', "^line 1: not UTF-8"),
        (b'{"text": "a"}\n' * 100_001, "more than 100,000 examples"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_line(store, files, data, message):
    with pytest.raises(InvalidTrainingData, match=message) as caught:
        upload(store, data)
    assert caught.value.param == "file"
    assert files.page("acme", None, 10) == []
    assert list(store.blobs.digests()) == []


def test_pages_are_in_the_order_of_coming_or_against_it(store, files, clock):
    made = []
    for _ in range(5):
        made.append(upload(store, DATA).id)
        clock.now += 0.002
    upload(store, DATA, tenant="other")
    for order, newest_first in ((made, False), (made[::-1], True)):
        found, after = [], None
        while page := files.page("acme", after, 2, newest_first=newest_first):
            assert len(page) <= 2
            found += [file.id for file in page]
            after = found[-1]
        assert found == order
    with pytest.raises(InvalidRequest, match="after must be the id of a file, got 'no id'"):
        files.page("acme", "no id", 10)


def test_a_long_name_is_cut_and_a_bad_tenant_refused(store):
    assert len(upload(store, DATA, filename="x" * 10_000).filename) == LONGEST_NAME
    with pytest.raises(InvalidName):
        upload(store, DATA, tenant="../x")


# what they cost, and how long they stay


def test_bytes_count_against_the_quota_and_come_back(store, files):
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"bytes": len(DATA)})
    made = upload(store, DATA)
    assert store.tenants.usage("acme").bytes == len(DATA)
    with pytest.raises(QuotaExceeded):
        upload(store, OTHER)
    files.delete("acme", made.id)
    assert store.tenants.usage("acme").bytes == 0
    assert upload(store, OTHER)
    invariants.check(store.backend)


def test_what_has_expired_does_not_keep_a_tenant_from_uploading(store, clock):
    version = store.prefixes.save("acme", "ends", manifest(), tensors(manifest()), lifetime=60.0)
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"bytes": version.size_bytes})
    with pytest.raises(QuotaExceeded):
        upload(store, DATA)
    clock.now += 60
    assert upload(store, DATA)


def test_collection_takes_no_blob_that_a_file_names(store, files, clock):
    made = upload(store, DATA)
    clock.now += 2 * HOLD_SECONDS
    assert store.collect() == 0
    assert files.read(made) == DATA
    store.backend.write(lambda transaction: transaction.delete(f"blob/{made.digest}/file/{made.id}"))
    assert store.collect() == 1  # the record of the reason is what has kept it


def test_deleting_removes_the_bytes_unless_something_else_names_them(store, files):
    first, second = upload(store, DATA), upload(store, DATA, tenant="other")
    assert files.delete("acme", first.id) == first
    assert files.read(second) == DATA
    files.delete("other", second.id)
    assert list(store.blobs.digests()) == []
    with pytest.raises(NoSuchFile):
        files.read(second)
    with pytest.raises(NoSuchFile):
        files.delete("other", second.id)
    invariants.check(store.backend)


def test_damage_is_corruption_and_not_absence(store, files):
    made = upload(store, DATA)
    damage(store, made.digest, b"other")
    with pytest.raises(StoreCorrupt):
        files.read(made)


def test_a_job_keeps_what_it_needs_when_its_file_is_deleted(store, files):
    line = b'{"text":"a"}\n'  # as it would be written for a job, so that both name one blob
    made = upload(store, line)
    job = store.jobs.submit("acme", "support", [{"text": "a"}], {}, about={"training_file": made.id})
    assert job.spec.data_digest == made.digest
    files.delete("acme", made.id)
    assert store.jobs.examples(job) == [{"text": "a"}]


def test_upload_and_deletion_are_in_the_audit_log(store, files, clock):
    made = upload(store, DATA, by="key abcdefgh")
    clock.now += 1
    files.delete("acme", made.id, by="local")
    lines = [(line.action, line.by, line.target, line.digest) for line in store.audit.entries(tenant="acme")]
    assert lines == [
        ("file.upload", "key abcdefgh", made.id, made.digest),
        ("file.delete", "local", made.id, made.digest),
    ]


def test_what_goes_with_an_upload_is_done_with_it_or_undoes_it(store, files):
    def fail(transaction, made):
        transaction.put("once/acme/x", made.id)
        raise StoreUnavailable("no")

    with pytest.raises(StoreUnavailable):
        upload(store, DATA, also=fail)
    assert files.page("acme", None, 10) == []
    seen = []
    made = upload(store, DATA, also=lambda transaction, file: seen.append(file))
    assert seen[-1] == made
    invariants.check(store.backend)


def test_an_erased_tenant_has_no_files(store, files):
    gone, kept = upload(store, OTHER), upload(store, DATA, tenant="other")
    store.erase_tenant("acme")
    assert list(store.blobs.digests()) == [kept.digest]
    with pytest.raises(NoSuchFile):
        files.find("acme", gone.id)
    assert files.find("other", kept.id) == kept
    invariants.check(store.backend)
