"""A secret setting that lies in a file, as Docker, systemd and Kubernetes hand secrets to a process."""

from __future__ import annotations

from pathlib import Path

MOST_BYTES = 4096


def read(path: str) -> str:
    """What the file holds, without the space around it. Raises ValueError, which never repeats the secret."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from None
    secret = text.strip()
    if len(text) > MOST_BYTES or not secret or not secret.isascii() or b"\n" in secret:
        raise ValueError("the file must hold one line of plain characters")
    return secret.decode("ascii")
