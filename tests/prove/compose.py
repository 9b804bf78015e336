"""The compose file brought up: upload, train and generate through the containers, and restart each under load.

Clients ask without a pause while the trainer, Redis and the server are restarted one after another, and another one
uploads a prefix a second. Whatever was answered with 201 must be there afterwards, with its digest, every answer must
be the one that the same request had before, and after `down` and `up` every prefix and job is as it was.
"""

from __future__ import annotations

import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.bench.progress import say
from tests.prove.bundled import FOLDER, load
from tests.prove.containers import Deployment
from tests.server import artefacts

SECTION = "compose"
CLIENTS = 8
CALM_SECONDS = 10.0  # of load before a restart and after it
PAUSE_SECONDS = 0.5  # of a client that was refused
WAIT_SECONDS = 300.0
STEPS, LONG_STEPS = 30, 300
NAMES = ("uploaded", "trained")
SERVICES = ("trainer", "redis", "server")
EXAMPLES = [{"prompt": f"{number} and {number + 1} is", "completion": f" {2 * number + 1}"} for number in range(30)]
PROMPTS = ("The king", "Once upon a time there was", "3 and 4 is")
# What a container may do, by its own account.
LOOK = "id -u; touch /x 2>/dev/null && echo writable || echo read-only; grep -E 'CapEff|NoNewPrivs' /proc/self/status"
BARE = ("10001", "read-only", "0000000000000000", "1")


def run(calm_seconds: float = CALM_SECONDS) -> dict[str, Any]:
    """Brings it up, works with it, restarts each part, takes it down and up again, and removes it."""
    deployment = Deployment.new()
    try:
        return _run(deployment, calm_seconds)
    finally:
        deployment.remove()


def _run(deployment: Deployment, calm_seconds: float) -> dict[str, Any]:
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        seconds[step] = round(time.monotonic() - begun, 1)
        say(f"{step}: {seconds[step]:.1f} s")

    wrong: list[str] = []
    with timed("make up, with the images built or there already"):
        deployment.make_up()
    with timed("until it is ready"):
        deployment.wait_until_ready()
    key, mode = deployment.key_file.read_text(), stat.S_IMODE(deployment.key_file.stat().st_mode)
    with timed("make up once more"):
        deployment.make_up()
    if deployment.key_file.read_text() != key:
        wrong.append("a second `make up` made another key")
    for service in ("server", "trainer"):
        looked = deployment.do("exec", "-T", service, "sh", "-c", LOOK).split()
        wrong += [f"{service} is not {what}: {looked}" for what in BARE if what not in looked]
    with deployment.client() as client:
        deployment.wait_until_ready()
        with timed("upload a prefix"):
            upload(client, "uploaded", (FOLDER / "prefixes" / "plays.safetensors").read_bytes())
        with timed(f"train one, {STEPS} steps"):
            wait_for(client, train(client, "trained", STEPS))
        with timed("generate with both"):
            expected = {(name, prompt): ask(client, name, prompt) for name in NAMES for prompt in PROMPTS}
        load_ = Load(deployment, expected)
        restarts = {}
        with load_.running():
            for service in SERVICES:
                restarts[service] = restart(deployment, client, load_, service, calm_seconds)
                say(f"restart of {service} under load: {restarts[service]}")
        before = inventory(client)
        lost = [name for name, digest in load_.stored.items() if before["prefixes"].get(f"{name}@1") != digest]
        with timed("down"):
            deployment.do("down")
        with timed("up, until it is ready"):
            deployment.do("up", "--detach")
            deployment.wait_until_ready()
        after = inventory(client)
        lost += changed(before, after)
        for name, prompt in expected:
            if ask(client, name, prompt) != expected[name, prompt]:
                wrong.append(f"{name} answers {prompt!r} otherwise after down and up")
    return {
        "by": deployment.compose.rpartition("/")[2],
        "seconds": seconds,
        "clients": CLIENTS,
        "restarts": restarts,
        "key_mode": f"{mode:04o}",
        "uploads": {"stored": len(load_.stored), "refused": load_.refused},
        "kept": {kind: len(after[kind]) for kind in after},
        "lost": lost,
        "wrong": wrong + load_.wrong,
    }


@dataclass
class Load:
    """Clients that ask all the time, and one that uploads; what became of it."""

    deployment: Deployment
    expected: dict[tuple[str, str], str]
    outcomes: list[tuple[float, str]] = field(default_factory=list)
    stored: dict[str, str] = field(default_factory=dict)
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The load, for as long as the block runs."""
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        threads.append(threading.Thread(target=self._upload))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def between(self, begin: float, end: float) -> Counter[str]:
        """How the requests ended that ended then."""
        return Counter(outcome for at, outcome in self.outcomes if begin <= at < end)

    def _ask(self, number: int) -> None:
        requests = list(self.expected)
        with self.deployment.client() as client:
            while not self._over.is_set():
                number += 1
                name, prompt = requests[number % len(requests)]
                outcome = "ok"
                try:
                    text = ask(client, name, prompt)
                except httpx.HTTPError as error:
                    outcome = how(error)
                else:
                    if text != self.expected[name, prompt]:
                        self.wrong.append(f"{name}, {prompt!r}: {text!r}")
                self.outcomes.append((time.monotonic(), outcome))
                if outcome != "ok":
                    self._over.wait(PAUSE_SECONDS)

    def _upload(self) -> None:
        """A prefix a second; one that was answered with 201 is `stored`."""
        frozen = load()
        number = 0
        with self.deployment.client() as client:
            while not self._over.wait(1.0):
                number += 1
                try:
                    name = f"written-{number}"
                    self.stored[name] = upload(client, name, artefacts.native(frozen, 4, seed=number))
                except httpx.HTTPError:
                    self.refused += 1


def how(error: httpx.HTTPError) -> str:
    """A failure as the client sees it: a status with its code, or what became of the connection."""
    if isinstance(error, httpx.HTTPStatusError):
        said = error.response.json() if "json" in error.response.headers.get("content-type", "") else {}
        return f"{error.response.status_code} {said.get('error', {}).get('code', '')}".strip()
    return type(error).__name__


def upload(client: httpx.Client, name: str, file: bytes) -> str:
    """Publishes a native file; its digest."""
    reply = client.post("/v1/prefixes", data={"id": name}, files={"file": ("f", file)}).raise_for_status()
    return str(reply.json()["digest"])


def train(client: httpx.Client, name: str, steps: int) -> str:
    """Asks for a prefix; the job's id."""
    body = {"examples": EXAMPLES, "steps": steps, "virtual_tokens": 8, "publish_anyway": True}
    return str(client.post(f"/v1/prefixes/{name}/train", json=body).raise_for_status().json()["job"]["id"])


def wait_for(client: httpx.Client, job: str) -> None:
    """Until the job has succeeded. Raises RuntimeError where it ends otherwise or goes on for ever."""
    wait_until_further(client, job, 1 << 30)


def wait_until_further(client: httpx.Client, job: str, steps: int) -> None:
    """Until the job has done more steps than these, or has succeeded. Raises RuntimeError where it never does."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        found = client.get(f"/v1/jobs/{job}").raise_for_status().json()
        if found["status"] == "succeeded" or steps_done(found) > steps:
            return
        if found["status"] in ("failed", "cancelled"):
            raise RuntimeError(f"{job} ended {found['status']}: {found['error']}")
        time.sleep(0.2)
    raise RuntimeError(f"{job} gets no further in {WAIT_SECONDS:.0f} s")


def steps_done(job: dict[str, Any]) -> int:
    """How far it has told that it is."""
    return int((job["progress"] or {}).get("step", 0))


def ask(client: httpx.Client, name: str, prompt: str) -> str:
    """A greedy answer."""
    body = {"prefix_id": name, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    return str(client.post("/generate", json=body).raise_for_status().json()["text"])


def inventory(client: httpx.Client) -> dict[str, dict[str, str]]:
    """Every version's digest and every job's state."""
    names = [one["id"] for one in _all(client, "/v1/prefixes")]
    versions = {
        f"{name}@{one['version']}": one["digest"]
        for name in names
        for one in client.get(f"/v1/prefixes/{name}/versions").raise_for_status().json()["data"]
    }
    return {"prefixes": versions, "jobs": {one["id"]: one["status"] for one in _all(client, "/v1/jobs")}}


def changed(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """What one inventory has that another has not, or has otherwise."""
    return [
        f"{kind}: {name}" for kind, found in before.items() for name in found if after[kind].get(name) != found[name]
    ]


def _all(client: httpx.Client, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        page = client.get(path, params={"after": found[-1]["id"]} if found else {}).raise_for_status().json()
        found += page["data"]
        if not page["has_more"]:
            return found


def restart(
    deployment: Deployment, client: httpx.Client, load_: Load, service: str, calm_seconds: float
) -> dict[str, Any]:
    """One container, in the middle of the load; how long until it works again, and what failed meanwhile."""
    time.sleep(calm_seconds)
    job = train(client, "interrupted", LONG_STEPS) if service == "trainer" else None
    if job:
        wait_until_further(client, job, 1)
    begun = time.monotonic()
    deployment.do("restart", service)
    restarted = time.monotonic() - begun
    if job:
        wait_until_further(client, job, steps_done(client.get(f"/v1/jobs/{job}").raise_for_status().json()))
    else:
        deployment.wait_until_ready()
    back = time.monotonic() - begun
    time.sleep(calm_seconds)
    outcomes = load_.between(begun, time.monotonic())
    if job:
        wait_for(client, job)
    answered = outcomes.pop("ok", 0)
    return {
        "command_seconds": round(restarted, 1),
        "works_after_seconds": round(back, 1),
        "answered": answered,
        "failed": dict(outcomes),
    }


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    failed = {service: sum(found["failed"].values()) for service, found in measured["restarts"].items()}
    bars = {
        "the first key is for its owner alone": measured["key_mode"] == "0600",
        "nothing lost": not measured["lost"],
        "nothing wrong": not measured["wrong"],
        "no request fails while the trainer restarts": failed["trainer"] == 0,
        "no request fails while Redis restarts": failed["redis"] == 0,
    }
    return [bar for bar, is_met in bars.items() if not is_met]


def table(measured: dict[str, Any]) -> str:
    """For docs/deploy.md."""
    steps = [f"| {step} | {taken:,.1f} |" for step, taken in measured["seconds"].items()]
    rows = [
        f"| {service} | {found['works_after_seconds']:.1f} | {found['answered']:,} | {_failures(found['failed'])} |"
        for service, found in measured["restarts"].items()
    ]
    kept, uploads = measured["kept"], measured["uploads"]
    return "\n".join(
        [
            *("| step | seconds |", "|---|---|", *steps, ""),
            f"| restarted under {measured['clients']} clients | works again after, s | answered meanwhile | failed |",
            *("|---|---|---|---|", *rows, ""),
            f"{uploads['stored']} uploads were answered with 201 meanwhile, {uploads['refused']} were refused; after "
            f"`down` and `up` {kept['prefixes']} versions and {kept['jobs']} jobs were there: "
            f"{len(measured['lost'])} lost, {len(measured['wrong'])} wrong.",
        ]
    )


def _failures(failed: dict[str, int]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in sorted(failed.items())) or "0"
