"""What the files of `docker/monitoring` ask Prometheus: the dashboard's queries, and the conditions of the alerts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from tests.e2e.processes import ROOT

FOLDER = ROOT / "docker" / "monitoring"
CONFIG, RULES = FOLDER / "prometheus.yml", FOLDER / "alerts.yml"
DASHBOARDS, PROVISIONING = FOLDER / "grafana" / "dashboards", FOLDER / "grafana" / "provisioning"
INTERVAL = "$__rate_interval"  # Grafana puts four scrapes here


@dataclass(frozen=True)
class Query:
    """One line of a panel, or the condition of an alert. `legend`: how Grafana names the series, with `{{label}}`."""

    title: str
    text: str
    legend: str = ""
    unit: str = ""

    def asked(self, seconds: int) -> str:
        """As Grafana would ask it, for rates over so many seconds."""
        return self.text.replace(INTERVAL, f"{seconds}s")


def panels() -> list[Query]:
    """Of every dashboard, every line of every panel."""
    found: list[Query] = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
            found += [
                Query(panel["title"], target["expr"], target["legendFormat"], unit)
                for target in panel.get("targets", ())
            ]
    return found


def alerts() -> list[Query]:
    """The condition of every alert."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [Query(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


def config(key_file: str, targets: dict[str, str]) -> dict[str, Any]:
    """The committed configuration, scraping these addresses by job instead of those of the compose network."""
    found: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    found["rule_files"] = [str(RULES)]
    for job in found["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [targets.pop(job["job_name"])]}]
        if "authorization" in job:
            job["authorization"]["credentials_file"] = key_file
    assert not targets, f"no job scrapes {', '.join(targets)}"
    return found
