"""Whether a grammar can be followed: tried in a process of its own first, for some would end this one.

A chain of a few hundred references overflows the compiler's stack, `multipleOf` of a large number has no end, and some
expressions of ten characters take hundreds of megabytes. What a stack of an eighth of a thread's, half a second and
`MOST_BYTES` suffice for is compiled in the server.

This module is also that process's program. It forks for every grammar, so what happens to one is nothing to the next.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from prefix_store.errors import Overloaded
from server.engine.grammar import GrammarError, Kind, Matcher, Source, compiled, vocabulary

STACK_BYTES = 1 << 20
CPU_SECONDS = 0.5
MOST_BYTES = 32 << 20
# Of each step, on average; the rows of all others wait for it.
STEP_SECONDS = 0.002
# What the allocator may reserve beyond that before it is refused.
RESERVE_BYTES = 256 << 20
# The process gives way to the engine, so it may wait long for its half second.
WALL_SECONDS = 30.0
LOW_PRIORITY = 10
WALKS, WALK_TOKENS = 2, 64
USUAL = Source(Kind.JSON, '{"type": "object"}')
ENDED = {
    signal.SIGPROF: f"it takes longer than {CPU_SECONDS:g} s to compile",
    signal.SIGSEGV: "it is too deep",
    signal.SIGBUS: "it is too deep",
    signal.SIGABRT: "it takes too much memory",
}


class Trials:
    """The process, from the server's side; it starts with the first trial. Of one thread at a time."""

    def __init__(self, tokenizer_json: str, size: int, end_ids: list[int]) -> None:
        self._tokens = {"tokenizer_json": tokenizer_json, "size": size, "end_ids": end_ids}
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, source: Source) -> int:
        """The bytes that the grammar takes. Raises GrammarError, and Overloaded where no trial could be made."""
        process = self._process = self._process or self._start()
        try:
            _send(process, {"kind": source.kind, "text": source.text})
            answer = _receive(process)
        except (OSError, ValueError, TimeoutError):
            self.close()
            raise Overloaded("no grammar could be tried in time; try again") from None
        if "error" in answer:
            raise GrammarError(answer["error"])
        size: int = answer["bytes"]
        return size

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        _send(process, self._tokens)
        return process


def _send(process: subprocess.Popen[bytes], message: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def _receive(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], WALL_SECONDS)[0]:
        raise TimeoutError
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def main() -> None:
    """Tries a grammar a line until there are no more, in the order in which they come."""
    os.nice(LOW_PRIORITY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = iter(sys.stdin.buffer)
    try:
        tokens = vocabulary(**json.loads(next(lines)))
    except GrammarError as error:
        failed = _failed(error)
        answers = (failed for _ in lines)
    else:
        base = _apart(USUAL, tokens)["bytes"]  # what a fork comes to, whatever the grammar
        asked = (json.loads(line) for line in lines)
        answers = (_weighed(_apart(Source(Kind(one["kind"]), one["text"]), tokens), base) for one in asked)
    for answer in answers:
        print(json.dumps(answer), flush=True)


def _weighed(answer: dict[str, Any], base: int) -> dict[str, Any]:
    if "error" in answer:
        return answer
    taken = max(0, answer["bytes"] - base)
    return {"bytes": taken} if taken <= MOST_BYTES else {"error": f"it takes more than {MOST_BYTES >> 20} MB"}


def _apart(source: Source, tokens: Any) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _limit()
        threading.stack_size(STACK_BYTES)
        trial = threading.Thread(target=lambda: os.write(writing, json.dumps(_tried(source, tokens)).encode()))
        trial.start()
        trial.join()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        answer: dict[str, Any] = json.loads(said)
        return answer
    ended = ENDED.get(signal.Signals(os.WTERMSIG(status))) if os.WIFSIGNALED(status) else None
    return {"error": ended or "it takes too much memory"}


def _limit() -> None:
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") if sys.platform == "linux" else open(os.devnull) as file:
        pages = file.read().split()
    if pages:  # elsewhere the size of a process says nothing
        resource.setrlimit(resource.RLIMIT_AS, (int(pages[0]) * resource.getpagesize() + RESERVE_BYTES, hard))


def _tried(source: Source, tokens: Any) -> dict[str, Any]:
    before = _peak_bytes()
    try:
        start = compiled(source, tokens)
        for seed in range(WALKS):
            _walk(start, tokens, random.Random(seed))
    except GrammarError as error:
        return _failed(error)
    return {"bytes": _peak_bytes() - before}


def _walk(start: Any, tokens: Any, draw: random.Random) -> None:
    """A random answer's beginning, for what a grammar costs shows only when it is followed."""
    matcher = Matcher(start, tokens.vocab_size)
    matcher.read([])  # the first step makes what the others need
    answer: list[int] = []
    begun = time.thread_time()
    while len(answer) < WALK_TOKENS:
        matcher.read(answer)
        allowed = matcher.allowed(tokens.vocab_size)
        allowed[tokens.eos_tokens] = False
        following = allowed.nonzero()[0]
        if not len(following):
            break
        answer.append(int(draw.choice(following)))
    if time.thread_time() - begun > WALK_TOKENS * STEP_SECONDS:
        raise GrammarError(f"it takes more than {1000 * STEP_SECONDS:g} ms a token to follow")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _failed(error: GrammarError) -> dict[str, Any]:
    return {"error": str(error)}


if __name__ == "__main__":
    main()
