"""docs/metrics.md and the code name the same metrics."""

from __future__ import annotations

import re

import pytest
import yaml

from tests import exposed
from tests.e2e.processes import ROOT

TEXT = (ROOT / "docs" / "metrics.md").read_text()
FAMILIES = {"The server": exposed.of_server(), "A worker": exposed.of_worker()}


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    part = TEXT.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("section", FAMILIES)
def test_every_family_is_listed_and_every_listed_one_is_exposed(section):
    listed = [(row[0].strip("`"), row[1], set(re.findall(r"`(\w+)`", row[2]))) for row in rows(section)]
    found = [(exposed.name(family), family.type, exposed.labels(family)) for family in FAMILIES[section]]
    assert sorted(listed, key=str) == sorted(found, key=str)


@pytest.mark.parametrize("section", FAMILIES)
def test_names_follow_prometheus_conventions(section):
    for name, kind, _, unit, meaning, _ in rows(section):
        bare = name.strip("`")
        assert re.fullmatch(r"(antefix|process)_[a-z0-9_]+", bare)
        assert bare.endswith("_total") == (kind == "counter"), bare
        for base in ("seconds", "bytes"):
            assert (unit == base) == bool(re.search(rf"_{base}(_total)?$", bare)), bare
        assert meaning, bare


def test_what_has_vllms_meaning_has_its_name():
    renamed = {"antefix_step_tokens": "iteration_tokens_total"}  # a histogram is no counter, so not `_total`
    for name, _, _, _, _, theirs in rows("The server"):
        if theirs:
            bare = name.strip("`")
            assert theirs.strip("`") == renamed.get(bare, bare.removeprefix("antefix_"))


def test_every_alert_is_explained():
    rules = yaml.safe_load((ROOT / "docker" / "monitoring" / "alerts.yml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert alerts == [row[0].strip("`") for row in rows("Prometheus and Grafana")]
