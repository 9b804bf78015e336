from prefix_store.job_needs import Needs
from tests.prefix_store.samples import SPEC


def test_needs_come_back_from_an_entry_and_none_from_an_old_one():
    needs = Needs.of(SPEC)
    assert needs == Needs(None, "prefix")
    assert Needs.from_json({"job": "ftjob-1", **needs.to_json()}) == needs
    assert Needs.from_json({"job": "ftjob-1", "at": 1.0, "until": None}) is None
