import inspect
import re

from prefix_store import layout
from prefix_store.migration import FOLDERS


def test_every_kind_of_record_that_is_laid_out_is_migrated():
    named = set(re.findall(r"^([a-z]+)/[A-Z]", layout.__doc__, re.MULTILINE))
    assert named == set(FOLDERS)


def test_every_key_is_in_its_folder():
    arguments = {
        "tenant": "acme", "name": "support", "number": 3, "at": 1.5, "reader": "other", "digest": "a" * 64,
        "file_id": "file-1", "job_id": "ftjob-1", "hold_id": "x", "folder": "queued", "key_id": "abcdefgh",
        "request": "r", "entry_id": "e",
    }  # fmt: skip
    makers = [
        maker
        for name, maker in inspect.getmembers(layout, inspect.isfunction)
        if not name.startswith("_") and name not in ("milliseconds", "number_of")
    ]
    assert len(makers) > 15
    for maker in makers:
        key = maker(**{name: arguments[name] for name in inspect.signature(maker).parameters})
        assert key.isascii()
        assert key.partition("/")[0] in FOLDERS


def test_numbers_and_times_sort_as_they_count():
    keys = [layout.version("acme", "support", number) for number in (1, 9, 10, 99, 100, 999_999_999)]
    assert keys == sorted(keys)
    times = [layout.milliseconds(at) for at in (0.0, 1.0, 999.0, 1e9, 2e9, 1e11)]
    assert times == sorted(times)
    assert layout.number_of(keys[3]) == 99


def test_a_tenants_folder_holds_nothing_of_one_whose_name_begins_alike():
    for other in ("acme-2", "acme.x", "acme0"):
        assert not layout.name(other, "support").startswith(layout.name("acme"))
        assert not layout.version(other, "a", 1).startswith(layout.versions("acme", "a"))
