"""Results as they come: a line of JSON each, and all in one file, so that whatever ends the run loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[3] / "docs" / "results"
FILE = "gpu.json"
# Exit codes of the process that fills it: its device is lost, and another may go on; there is none.
LOST, NOWHERE = 3, 4


class Record:
    """What is known so far: by piece its seconds, why it failed or was left out, and its results by name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"section": "gpu"}
        self.pieces: dict[str, dict[str, Any]] = self._content.setdefault("pieces", {})

    @classmethod
    def new(cls, path: Path) -> Record:
        """With nothing in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return cls(path)

    def note(self, **fields: Any) -> None:
        """What holds of all pieces."""
        self._content.update(fields)
        self._write(fields)

    def begin(self, piece: str) -> None:
        """From now on it is under way, until `end`."""
        self.pieces[piece] = {"under_way": True, "results": {}}
        self._write(None)

    def put(self, piece: str, name: str, found: dict[str, Any]) -> None:
        """One result of a piece, in the place of an older one of that name."""
        self.pieces[piece]["results"][name] = found
        self._write({"piece": piece, "result": name, **found})

    def end(self, piece: str, seconds: float | None = None, **why: str) -> None:
        """`why`: what it `failed` with, or why it was `left_out`."""
        held = self.pieces.setdefault(piece, {"results": {}})
        held.pop("under_way", None)
        held.update({} if seconds is None else {"seconds": round(seconds, 1)}, **why)
        self._write({"piece": piece, **{name: value for name, value in held.items() if name != "results"}})

    def end_cut_off(self, why: str) -> bool:
        """Ends what a process that is no more was at, if it was at anything."""
        cut_off = [name for name, held in self.pieces.items() if held.get("under_way")]
        for piece in cut_off:
            self.end(piece, failed=why)
        return bool(cut_off)

    def results(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By piece and name."""
        return {piece: held["results"] for piece, held in self.pieces.items()}

    @property
    def goals(self) -> dict[str, Any]:
        """Each with what was measured; None where nothing was."""
        found: dict[str, Any] = self._content.get("goals", {})
        return found

    @goals.setter
    def goals(self, goals: dict[str, Any]) -> None:
        self._content["goals"] = goals
        self._write(None)

    def wrong(self) -> list[str]:
        """Checks that did not pass, be it that they failed."""
        return [
            f"{piece}: {name}"
            for piece, results in self.results().items()
            for name, found in results.items()
            if not found.get("passed", True) or ("failed" in found and piece.startswith("check"))
        ]

    def _write(self, line: dict[str, Any] | None) -> None:
        if line is not None:
            print(json.dumps(line, ensure_ascii=False), flush=True)
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps(self._content, indent=1, ensure_ascii=False) + "\n")
        os.replace(aside, self._path)
