"""A hundred users: 20 authors, each cut into 5 disjoint parts, trained through the queue and scored in mixed batches.

A user is a tenant with a fifth of an author's training rows. Its prefix is judged on the author's whole test file, of
which it saw nothing, beside the bare model and beside the prefixes of all other authors' users.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy
from rich.progress import track

from prefix_store.jobs import JobStatus
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from server.engine.prefix_loader import payload_of
from server.scheduler.messages import PrefixPayload
from tests.bench import plots
from tests.prove.bundled import Bench, data_folder, load
from trainer.data import tokenize
from trainer.worker import Worker

SECTION = "users"
PARTS = 5
NAME = "voice"
OPTIONS: dict[str, Any] = {"virtual_tokens": 16, "steps": 60, "max_length": 160, "publish_anyway": True}
KEPT = Path("~/.cache/antefix/prove").expanduser()
GOAL = 95


def run() -> dict[str, Any]:
    """Bits per byte of every author's test rows under every user's prefix; goes on where it was cut off."""
    authors = sorted(path.name for path in (data_folder() / "authors").iterdir())
    frozen = load()
    folder = KEPT / f"users-{frozen.digest[:12]}"
    store = Store.open(f"sqlite:///{folder}/store.db")
    users = [(author, part) for author in authors for part in range(PARTS)]
    for author, part in users:
        _submit(store, author, part)
    Worker(store, frozen, "users").run_until_empty()
    bench = Bench()
    prefixes = {user: _prefix(store, bench, *user) for user in users}
    return {"authors": authors, "options": OPTIONS, **_score(bench, authors, prefixes, folder / "scores")}


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    return [what for what in ("better_than_none", "better_than_others") if measured[what] < GOAL]


def table(measured: dict[str, Any]) -> str:
    """What was counted, and the matrix of authors: each row a test file, its best in bold."""
    users = len(measured["authors"]) * PARTS
    names = [author.split("_")[-1] for author in measured["authors"]]
    lines = [
        f"Of {users} users' prefixes, {measured['better_than_none']} tell their author's unseen rows better than the "
        f"bare model does, {measured['better_than_others']} better than the other authors' prefixes do on average, and "
        f"{measured['best_of_all']} of {len(names)} authors' rows are told best by their own prefixes.",
        "",
        f"| bits per byte of rows by | none | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, bare, row in zip(names, measured["bare"], measured["matrix"], strict=True):
        cells = [f"**{bits:.3f}**" if bits == min(row) else f"{bits:.3f}" for bits in row]
        lines.append(f"| {name} | {bare:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(measured: dict[str, Any]) -> None:
    """The matrix in colours, each row less its bare model's bits."""
    gains = [[bits - bare for bits in row] for row, bare in zip(measured["matrix"], measured["bare"], strict=True)]
    names = [author.replace("_", " ") for author in measured["authors"]]
    plots.draw_matrix("users.svg", gains, names, "bits per byte against the bare model")


def count(bare: list[float], by_user: list[list[list[float]]]) -> dict[str, Any]:
    """What is told of users: `by_user[a][b][i]` is the bits of author a's test rows under part i of author b."""
    matrix = [[statistics.fmean(parts) for parts in row] for row in by_user]
    better_than_none = better_than_others = 0
    for author, row in enumerate(by_user):
        others = statistics.fmean(bits for other, parts in enumerate(row) if other != author for bits in parts)
        better_than_none += sum(bits < bare[author] for bits in row[author])
        better_than_others += sum(bits < others for bits in row[author])
    best = sum(row[author] == min(row) for author, row in enumerate(matrix))
    return {
        "bare": bare,
        "matrix": matrix,
        "better_than_none": better_than_none,
        "better_than_others": better_than_others,
        "best_of_all": best,
    }


def part_of(rows: list[dict[str, str]], author: str, part: int) -> list[dict[str, str]]:
    """One of five disjoint parts of an author's rows, drawn once for all."""
    order = list(range(len(rows)))
    random.Random(author).shuffle(order)
    return [rows[index] for index in sorted(order[part::PARTS])]


def _submit(store: Store, author: str, part: int) -> None:
    tenant = f"{author}-{part}"
    jobs = store.jobs.jobs(tenant, None, 100)
    if not any(job.status is not JobStatus.FAILED for job in jobs):
        store.jobs.submit(tenant, NAME, part_of(_rows(author, "train"), author, part), {**OPTIONS, "seed": part})


def _prefix(store: Store, bench: Bench, author: str, part: int) -> PrefixPayload:
    version = store.prefixes.resolve(PrefixRef(f"{author}-{part}", NAME))
    manifest, tensors = store.prefixes.read(version)
    return payload_of(version.digest, manifest, tensors, bench.model.dtype)


def _score(
    bench: Bench, authors: list[str], prefixes: dict[tuple[str, int], PrefixPayload], folder: Path
) -> dict[str, Any]:
    """Each author's bits are kept in a file, named by what they are of."""
    folder.mkdir(exist_ok=True)
    which = hashlib.sha256("".join(prefix.digest for prefix in prefixes.values()).encode()).hexdigest()[:12]
    bare, by_user = [], []
    for author in track(authors, "scoring"):
        kept = folder / f"{author}-{which}.json"
        if not kept.exists():
            partial = kept.with_suffix(".part")
            partial.write_text(json.dumps(_bits(bench, author, list(prefixes.values()))), "utf-8")
            partial.replace(kept)
        bits = json.loads(kept.read_text("utf-8"))
        bare.append(bits[0])
        by_user.append([bits[1 + PARTS * other :][:PARTS] for other in range(len(authors))])
    return count(bare, by_user)


def _bits(bench: Bench, author: str, prefixes: list[PrefixPayload]) -> list[float]:
    """Bits per byte of an author's test rows, without a prefix and with each."""
    rows = _rows(author, "test")
    examples = tokenize(bench.model.tokenizer, rows, bench.model.context_length // 2)
    size = math.log(2) * sum(len(row["completion"].encode()) for row in rows)
    # one list, so that all prefixes stand in the same batches
    payloads: list[PrefixPayload | None] = [None, *prefixes]
    nats = bench.nats([e for e in examples for _ in payloads], payloads * len(examples))
    bits: list[float] = (numpy.array(nats).reshape(len(examples), len(payloads)).sum(0) / size).tolist()
    return bits


def _rows(author: str, name: str) -> list[dict[str, str]]:
    file = data_folder() / "authors" / author / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]  # they also name their book
