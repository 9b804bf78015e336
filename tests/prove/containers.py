"""The compose file brought up for a proof: by Docker where there is an engine, else by podman with the rig's help."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.e2e.processes import free_port
from tests.prove.bundled import DATA

ROOT = Path(__file__).parents[2]
RIG = DATA.parent / "compose-rig"
PROJECT = "antefix-prove"
UP_SECONDS = 300.0


def program() -> str:
    """What understands compose files here. Raises SystemExit with one line where nothing does."""
    if shutil.which("docker") and _succeeds("docker", "info") and _succeeds("docker", "compose", "version"):
        return "docker compose"
    if not (RIG / "setup").is_file():
        raise SystemExit(f"this proof needs a Docker engine with compose, or the rig in {RIG}, and there is neither")
    subprocess.run([RIG / "setup"], check=True, stdout=subprocess.DEVNULL)
    return str(RIG / "compose")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclass
class Deployment:
    """What `make up` brings up, apart from whatever else runs on this machine: its own project, port and secrets."""

    compose: str
    secrets: Path
    port: int

    @classmethod
    def new(cls) -> Deployment:
        """Not up yet."""
        return cls(program(), Path(tempfile.mkdtemp(prefix="antefix-")) / "secrets", free_port())

    @property
    def environment(self) -> dict[str, str]:
        """For `make` and for compose."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ANTEFIX_")}
        mine = {"COMPOSE": self.compose, "COMPOSE_PROJECT_NAME": PROJECT, "SECRETS": str(self.secrets)}
        mine["ANTEFIX_PORT"] = str(self.port)
        # the rig's own Redis image has another number for its user than the official ones
        return clean | mine | ({"REDIS_USER": "redis"} if self.compose.startswith(str(RIG)) else {})

    @property
    def key_file(self) -> Path:
        """Where `make up` leaves the first key."""
        return self.secrets / "admin.key"

    def make_up(self) -> str:
        """`make up`; what it printed."""
        return self._run("make", "--no-print-directory", "up")

    def do(self, *arguments: str) -> str:
        """One call of compose; what it printed."""
        return self._run(*self.compose.split(), *arguments)

    def client(self) -> httpx.Client:
        """Speaks to the server with the first key."""
        headers = {"authorization": f"Bearer {self.key_file.read_text().strip()}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=120)

    def wait_until_ready(self) -> float:
        """The seconds until the server is ready. Raises RuntimeError with the logs where it never is."""
        begun = time.monotonic()
        while time.monotonic() < begun + UP_SECONDS:
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5).raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.2)
            else:
                return time.monotonic() - begun
        raise RuntimeError(f"the server is not ready:\n{self.do('logs')[-4000:]}")

    def remove(self) -> None:
        """Ends it, and removes what it kept."""
        try:
            self.do("down", "--volumes")
        finally:
            shutil.rmtree(self.secrets.parent)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout
