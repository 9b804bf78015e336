"""The bundled model and prefixes behind the serving engine, for proofs that measure what a user would get."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

import prefix_store
from prefix_store import codec
from prefix_store.model import frozen, prompt
from prefix_store.model.frozen import FrozenModel
from server.engine.engine import Engine
from server.engine.prefix_loader import payload_of
from server.scheduler.messages import GenerationRequest, PrefixPayload, TokenEvent
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Limits
from trainer.data import Example

FOLDER = Path(prefix_store.__file__).parent / "bundled"
DATA = Path(__file__).parents[3] / "shared" / "data"
Work = tuple[Sequence[int], SamplingParams, PrefixPayload | None]


def data_folder() -> Path:
    """The folder of real texts. Raises SystemExit with one line where it is not."""
    if not DATA.is_dir():
        raise SystemExit(f"this proof needs the texts in {DATA}, and there is no such folder")
    return DATA


def load() -> FrozenModel:
    """The bundled model, float32, for training through the reference or for an engine to take over."""
    return frozen.load(FOLDER / "model")


class Bench:
    """An engine over the bundled model that runs whole lists of requests."""

    def __init__(self, model: FrozenModel | None = None) -> None:
        self.model = model or load()
        limits = Limits(
            slots=65_536, rows=64, step_tokens=1024, context_length=self.model.context_length, waiting=100_000
        )
        self._engine = Engine(self.model, limits)

    def prefixes(self, folder: Path = FOLDER / "prefixes") -> dict[str, PrefixPayload]:
        """The native files of a folder by name."""
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            manifest, tensors = codec.decode(file)
            found[file.stem] = payload_of(file.stem, manifest, tensors, self.model.dtype)
        return found

    def write(self, texts: Sequence[str], params: SamplingParams, prefix: PrefixPayload | None = None) -> list[str]:
        """What follows each text; row i is sampled with seed i."""
        ids = [prompt.encode(self.model.tokenizer, text) for text in texts]
        events = self._run([(row, params, prefix) for row in ids])
        rows = [[token for event in of_row for token in event.token_ids] for of_row in events]
        return [self.model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def nats(self, examples: Sequence[Example], prefixes: Sequence[PrefixPayload | None]) -> list[float]:
        """-log p of each example's completion under its prefix, by the serving engine."""
        params = SamplingParams(max_tokens=1, temperature=0.0, echo=True, logprobs=0)
        events = self._run([(example.ids, params, prefix) for example, prefix in zip(examples, prefixes, strict=True)])
        return [_completion_nats(example, row) for example, row in zip(examples, events, strict=True)]

    def _run(self, work: Sequence[Work]) -> list[list[TokenEvent]]:
        events: list[list[TokenEvent]] = [[] for _ in work]
        for index, (ids, params, prefix) in enumerate(work):
            self._engine.scheduler.add(GenerationRequest(str(index), "", tuple(ids), params, prefix), seed=index)
        with Progress(transient=True) as bar:
            shown, left = bar.add_task("requests", total=len(work)), len(work)
            while left:
                for event in self._engine.step():
                    if event.error is not None:
                        raise event.error
                    events[int(event.request_id)].append(event)
                    left -= event.finish_reason is not None
                bar.update(shown, completed=len(work) - left)
        return events


def _completion_nats(example: Example, events: Sequence[TokenEvent]) -> float:
    scored = next(event.prompt_logprobs for event in events if event.prompt_logprobs is not None)
    logprobs = [entry.logprob for entry in scored[example.prompt_length :]]
    assert None not in logprobs, "a token without a log-probability"
    return -sum(logprob for logprob in logprobs if logprob is not None)
