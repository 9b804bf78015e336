"""What every client is asked, and what it must have read: the answers of `/generate`, streamed or not.

A client is a program of its own in `programs/`, as its users write it. Its only argument is the question as JSON; it
prints what it read as JSON: `{"answers": {model: {what: text}}, "errors": [{"kind", "message"}]}`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

PROGRAMS = Path(__file__).parent / "programs"
BASE, WRONG = "antefix-demo", "no-such-prefix"
MODELS = (BASE, "plays", "default/carroll@1")
PROMPT = "The king"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is at the door?"}]
MAX_TOKENS = 16
PROGRAM_SECONDS = 300


@dataclass(frozen=True)
class Expected:
    """The greedy texts of each model, by what it was asked: `completion` or `chat`."""

    texts: dict[str, dict[str, str]]

    @classmethod
    def of(cls, client: httpx.Client) -> Expected:
        """Asks `/generate`. No two models may agree, or a client that mixes them up would go unnoticed."""
        ids = client.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
        texts = {
            model: {"completion": generated(client, model, PROMPT), "chat": generated(client, model, ids)}
            for model in MODELS
        }
        assert len({text for of_model in texts.values() for text in of_model.values()}) == 2 * len(MODELS), texts
        return cls(texts)

    def check(self, read: dict[str, Any], *kinds: str) -> None:
        """That a client has read these texts, whole and streamed, of the kinds that it can ask for."""
        for model, texts in self.texts.items():
            for kind in kinds:
                assert read["answers"][model][kind] == texts[kind], (model, kind)
                assert read["answers"][model][f"streamed {kind}"] == texts[kind], (model, kind)
        assert read["answers"].keys() == self.texts.keys()


def check_errors(read: dict[str, Any], *kinds: str) -> None:
    """That a client has raised these classes of its own for a wrong name, and that they say what is wrong."""
    assert [error["kind"] for error in read["errors"]] == list(kinds)
    assert all(f"The model `{WRONG}` does not exist" in error["message"] for error in read["errors"]), read["errors"]


def generated(client: httpx.Client, model: str, prompt: str | list[int], **settings: Any) -> str:
    """The text that `/generate` answers, greedy and `MAX_TOKENS` long where nothing else is said."""
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, **settings}
    if model != BASE:
        body["prefix_id"] = model
    reply = client.post("/generate", json=body).raise_for_status()
    text: str = reply.json()["text"]
    return text


def question(url: str, **more: Any) -> str:
    """What a program gets."""
    asked = {"prompt": PROMPT, "messages": MESSAGES, "max_tokens": MAX_TOKENS, "models": MODELS, "wrong": WRONG}
    return json.dumps({"url": url, **asked, **more})


def python_program(name: str, argument: str, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """What a program of `programs/` prints."""
    return _read([sys.executable, "-W", "ignore", str(PROGRAMS / name), argument], environment, folder)


def node_program(name: str, argument: str, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """The same for Node.js, which looks for packages from where it is started."""
    code = (PROGRAMS / name).read_text("utf-8")
    return _read(["node", "--input-type=module", "--eval", code, argument], environment, folder)


def printed(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """What a command prints; fails with everything it said when it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PROGRAM_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _read(command: list[str], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(command, environment, folder).splitlines()[-1])
    return found
