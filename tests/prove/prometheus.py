"""A real Prometheus: the program on the path, started on a free port, asked over HTTP, always ended."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.e2e.processes import START_SECONDS, STOP_SECONDS, free_port

PROGRAMS = ("prometheus", "promtool")


def check_installed() -> None:
    """Raises SystemExit with one line where Prometheus is not on the path."""
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise SystemExit(f"this proof needs {program} on the path: apt-get install prometheus")


def version() -> str:
    """What the program says that it is."""
    shown = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"version (\S+)", shown.stdout + shown.stderr)
    return found[1] if found else "unknown"


def promtool(*arguments: str, given: str | None = None) -> str:
    """What it printed. Raises AssertionError with that where it found fault."""
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, check=False)
    printed = (done.stdout + done.stderr).strip()
    assert done.returncode == 0, f"promtool {' '.join(arguments)}: {printed}"
    return printed


class Prometheus:
    """Scrapes by a configuration file; what it knows is in a folder beside it."""

    def __init__(self, config: Path) -> None:
        self._log = config.with_suffix(".log")
        address = f"127.0.0.1:{free_port()}"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={config.with_suffix('.data')}",
                    f"--web.listen-address={address}",
                ],
                stdout=output,
                stderr=output,
            )
        self._client = httpx.Client(base_url=f"http://{address}", timeout=30)

    def __enter__(self) -> Prometheus:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            try:
                self._client.get("/-/ready").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.1)
            else:
                return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(STOP_SECONDS)

    def query(self, text: str) -> list[dict[str, Any]]:
        """The series now, each with `metric` and `value`. Raises ValueError for a query that has a fault."""
        return self._get("query", query=text)["result"]

    def over_time(self, text: str, begun: float, step: float) -> list[dict[str, Any]]:
        """The series since then, each with `metric` and `values`. Raises ValueError."""
        return self._get("query_range", query=text, start=begun, end=time.time(), step=step)["result"]

    def rules(self) -> list[dict[str, Any]]:
        """Every alert rule as it was last evaluated."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> dict[str, dict[str, Any]]:
        """Every target by its job."""
        return {target["labels"]["job"]: target for target in self._get("targets")["activeTargets"]}

    def _get(self, what: str, **parameters: Any) -> Any:
        reply = self._client.get(f"/api/v1/{what}", params=parameters).json()
        if reply["status"] != "success":
            raise ValueError(f"{parameters}: {reply['error']}")
        return reply["data"]
