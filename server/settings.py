"""The server's settings: the only reader of the environment in this process."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from prefix_store import jobs, secret_file
from prefix_store.backends.base import DEFAULT_STORE
from server.loopback import is_loopback

PREFIX = "ANTEFIX_"
# Read by the trainer and the command line, which share this environment.
ELSEWHERE = (
    *("ANTEFIX_TRAIN_MEMORY_MB", "ANTEFIX_WORKER_METRICS_HOST", "ANTEFIX_WORKER_METRICS_PORT"),
    *("ANTEFIX_URL", "ANTEFIX_API_KEY", "ANTEFIX_API_KEY_FILE"),
)


class Settings(BaseSettings):
    """One field a variable: `ANTEFIX_` and the field's name in capitals. An empty variable counts as absent."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    model: str | None = Field(default=None, description="hub id or folder; the bundled model if absent")
    model_name: str | None = Field(default=None, description="what replies call the model; the folder's name if absent")
    store_file: Annotated[str, BeforeValidator(secret_file.read)] | None = Field(
        default=None, repr=False, description="a file with the store's address, password and all; goes before `store`"
    )
    store: Annotated[str, AfterValidator(lambda store, info: info.data.get("store_file") or store)] = Field(
        default=DEFAULT_STORE, validate_default=True, repr=False
    )
    blobs: str | None = Field(default=None, description="a folder beside the SQLite file if absent")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    require_prefix: bool = False
    chat_template: Path | None = Field(default=None, description="a file; the tokenizer's own template if absent")
    methods: Annotated[dict[str, Path], NoDecode, BeforeValidator(jobs.method_files)] = Field(
        default={},
        validate_default=False,
        description="the worker's own tuning methods; only their names count here, no file is opened",
    )
    compile: bool = Field(default=False, description="on CUDA: torch.compile before steps are recorded")
    max_upload_mb: int = Field(default=256, ge=1, le=65536)
    max_waiting: int = Field(default=1024, ge=1)
    max_batch: int = Field(default=64, ge=1, le=4096, description="rows that run at the same time")
    step_tokens: int = Field(default=512, ge=16, description="tokens that one step may take, prompts included")
    drain_seconds: float = Field(
        default=20.0, ge=0, le=3600, description="what running requests get to finish in after SIGTERM"
    )
    kv_slots: int = Field(
        default=0, ge=0, description="tokens that the KV pool holds; 0 chooses by the memory there is"
    )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The ways to tune a prefix that a job may ask for."""
        return (*jobs.BUILT_IN_METHODS, *self.methods)


def read() -> Settings:
    """Reads the environment. Raises SystemExit with one line that names the variable."""
    _refuse_unknown(os.environ)
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = f"{PREFIX}{first['loc'][0]}".upper()
        reason = first["msg"].removeprefix("Value error, ")
        raise SystemExit(f"antefix: {name}={str(first['input'])[:80]!r}: {reason}") from None


def environment_at(host: str, port: int) -> dict[str, str]:
    """This process's environment for a server at another address."""
    return {**os.environ, f"{PREFIX}HOST": host, f"{PREFIX}PORT": str(port)}


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    """A misspelt variable would otherwise be its default, silently."""
    known = [*(f"{PREFIX}{name}".upper() for name in Settings.model_fields), *ELSEWHERE]
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known:
            # without what all have in common, which would make every name near to every other
            own = [other.removeprefix(PREFIX) for other in known]
            near = difflib.get_close_matches(name.removeprefix(PREFIX), own, n=1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
            raise SystemExit(f"antefix: {name} is not a setting{hint}")
