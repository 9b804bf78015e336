"""The monitoring files are sound: they ask only for what the code exposes, and the proof's own arithmetic is right."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests import exposed
from tests.prove import boards, monitoring

FAMILIES = [*exposed.of_server(), *exposed.of_worker()]
SAMPLES = {sample: exposed.labels(family) for family in FAMILIES for sample in exposed.samples(family)}
# What Prometheus itself adds.
OWN = {"job", "instance", "le"}
WORD = re.compile(r"[a-z_][a-z0-9_]*")
QUERIES = [*boards.panels(), *boards.alerts()]


def names(text: str) -> set[str]:
    """The metrics that a query asks for."""
    return set(re.findall(r"\b(?:antefix|process)_\w+|\bup\b", text))


def asked_labels(text: str) -> set[str]:
    """The labels that a query chooses or groups by."""
    chosen = [WORD.match(part.strip())[0] for found in re.findall(r"{([^}]*)}", text) for part in found.split(",")]
    grouped = [label.strip() for found in re.findall(r"\bby \(([^)]*)\)", text) for label in found.split(",")]
    return {*chosen, *grouped}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.title)
def test_a_query_asks_for_what_is_exposed(query):
    asked = names(query.text)
    assert asked, "it asks for nothing"
    assert asked <= SAMPLES.keys() | {"up"}
    having = OWN.union(*(SAMPLES.get(name, set()) for name in asked))
    assert asked_labels(query.text) <= having
    assert set(re.findall(r"{{\s*(\w+)\s*}}", query.legend)) <= having


def test_what_asks_for_a_name_that_is_not_there_is_found_out():
    assert not names("rate(antefix_tokens_total[1m])") <= SAMPLES.keys()
    text = 'sum by (le, tenant) (rate(a_bucket{tier="host", x=~"y"}[5m]))'
    assert asked_labels(text) == {"le", "tenant", "tier", "x"}


def test_only_counters_and_histograms_are_asked_for_rates():
    growing = {sample for sample in SAMPLES if sample.endswith(("_total", "_bucket", "_sum", "_count"))}
    for query in QUERIES:
        assert set(re.findall(r"\b(?:rate|increase)\((\w+)", query.text)) <= growing, query.title


@pytest.mark.parametrize("path", sorted(boards.DASHBOARDS.glob("*.json")), ids=lambda path: path.name)
def test_a_dashboard_is_sound(path):
    board = json.loads(path.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    (source,) = yaml.safe_load((boards.PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == source["uid"]
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs) > 0


def test_every_alert_says_what_has_happened():
    groups = yaml.safe_load(boards.RULES.read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_targets_are_the_only_thing_that_the_proof_changes():
    targets = {"antefix-server": "a:1", "antefix-trainer": "b:2"}
    committed, used = yaml.safe_load(boards.CONFIG.read_text()), boards.config("/key", dict(targets))
    assert [job["static_configs"][0]["targets"] for job in used["scrape_configs"]] == [["a:1"], ["b:2"]]
    assert used["global"] == committed["global"]
    assert used["scrape_configs"][0]["authorization"] == {"credentials_file": "/key"}
    with pytest.raises(AssertionError, match="no job scrapes other"):
        boards.config("/key", targets | {"other": "c:3"})


def test_the_panels_that_are_plotted_are_there():
    assert set(monitoring.SHOWN) <= {query.title for query in boards.panels()}
    assert set().union(*monitoring.EXPECTED.values()) <= {alert.title for alert in boards.alerts()}


def test_what_the_proof_missed_is_said():
    good = {
        "targets": {"a": "up", "b": "up"},
        "empty": [],
        "rules": {"x": "ok"},
        "firing": [],
        "lints": ["", ""],
        "failed": [],
        "killed": {name: dict.fromkeys(alerts, 1.0) for name, alerts in monitoring.EXPECTED.items()},
    }
    assert monitoring.missed(good) == []
    bad = {
        "targets": {"a": "up", "b": "down"},
        "empty": ["q"],
        "rules": {"x": "err"},
        "firing": ["x"],
        "lints": ["", "odd"],
        "failed": ["y"],
        "killed": {"worker": {}},
    }
    assert len(monitoring.missed(good | bad)) == 7
