"""`python -m tests.bench.streams_stub STREAMS EVENTS SECONDS`: a server that computes nothing.

It prints its port, waits for so many requests, and sends each of them as many events as a real answer has, evenly over
the seconds, all streams at the same moments, as an engine's steps would.
"""

from __future__ import annotations

import asyncio
import json
import sys

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = {"id": f"gen-{'0' * 32}", "index": 0, "text": " abc", "finish_reason": None}
LAST = {**PIECE, "finish_reason": "length", "usage": {"completion_tokens": 0}}


def chunk(text: str) -> bytes:
    """One event as it goes over the wire."""
    data = f"data: {text}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def main(streams: int, events: int, seconds: float) -> None:
    """Serves one round and ends."""
    writers: list[asyncio.StreamWriter] = []
    everybody = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writers.append(writer)
        if len(writers) == streams:
            everybody.set()

    server = await asyncio.start_server(take, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await everybody.wait()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for writer in writers:
        writer.write(HEAD)
    for number in range(1, events + 1):
        await asyncio.sleep(max(0.0, begun + seconds * number / events - loop.time()))
        piece = chunk(json.dumps(PIECE if number < events else LAST))
        for writer in writers:
            writer.write(piece)
    for writer in writers:
        writer.write(chunk("[DONE]") + b"0\r\n\r\n")
        await writer.drain()
        writer.close()
    server.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
