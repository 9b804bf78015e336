"""`python -m tests.bench.streams_client PORT FILE`: reads all of a file's requests as streams at once, as one process.

Prints a line when it begins, and at the end one line of JSON: seconds, events, tokens, texts, and its own CPU seconds.
It knows just enough HTTP to cost little; whoever is measured beside it pays for it too.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATH, JSON = "/generate", "Content-Type: application/json"
BEGUN = "begun"


@dataclass
class Stream:
    """What came of one request."""

    events: int = 0
    tokens: int = 0
    pieces: list[str] = field(default_factory=list)


async def read(port: int, body: dict[str, Any]) -> Stream:
    """One request, to its last event. Raises RuntimeError for an answer that is no stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nContent-Length: {len(payload)}\r\n\r\n"
    writer.write(head.encode() + payload)
    stream = Stream()
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read(2000)).decode())
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            stream.events += 1
            stream.pieces.append(event["text"])
            if "usage" in event:
                stream.tokens = event["usage"]["completion_tokens"]
        elif line.startswith(b"data: [DONE]"):
            break
    writer.close()
    return stream


async def main(port: int, bodies: list[dict[str, Any]]) -> None:
    """All of them at the same time."""
    print(BEGUN, flush=True)
    begun = time.perf_counter()
    streams = await asyncio.gather(*(read(port, body) for body in bodies))
    seconds = time.perf_counter() - begun
    print(
        json.dumps(
            {
                "seconds": seconds,
                "events": sum(stream.events for stream in streams),
                "tokens": sum(stream.tokens for stream in streams),
                "texts": ["".join(stream.pieces) for stream in streams],
                "cpu_seconds": time.process_time(),
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())))
