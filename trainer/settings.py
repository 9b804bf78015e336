"""The trainer's settings: the only reader of the environment in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from prefix_store import jobs, secret_file
from prefix_store.backends.base import DEFAULT_STORE

PREFIX = "ANTEFIX_"


class Settings(BaseSettings):
    """One field a variable: `ANTEFIX_` and the field's name in capitals. An empty variable counts as absent.

    Shares its environment with the server, so that variables of the server's alone are passed over. Training is always
    in float32, whatever `ANTEFIX_DTYPE` the server serves in.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore", protected_namespaces=()
    )

    model: str | None = Field(default=None, description="hub id or folder; the bundled model if absent")
    model_name: str | None = Field(
        default=None, description="what the start line calls the model; the folder's name if absent"
    )
    store_file: Annotated[str, BeforeValidator(secret_file.read)] | None = Field(
        default=None, repr=False, description="a file with the store's address, password and all; goes before `store`"
    )
    store: Annotated[str, AfterValidator(lambda store, info: info.data.get("store_file") or store)] = Field(
        default=DEFAULT_STORE, validate_default=True, repr=False
    )
    blobs: str | None = Field(default=None, description="a folder beside the SQLite file if absent")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    methods: Annotated[dict[str, Path], NoDecode, BeforeValidator(jobs.method_files)] = Field(
        default={}, validate_default=False, description="Python files of tuning methods, with commas between them"
    )
    train_memory_mb: int = Field(default=0, ge=0, description="what steps may take; 0 for half of what is free")
    worker_metrics_host: str = "127.0.0.1"
    worker_metrics_port: int = Field(default=8001, ge=0, le=65535, description="0 for none")


def read() -> Settings:
    """Reads the environment. Raises SystemExit with one line that names the variable."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = f"{PREFIX}{first['loc'][0]}".upper()
        reason = first["msg"].removeprefix("Value error, ")
        raise SystemExit(f"antefix worker: {name}={str(first['input'])[:80]!r}: {reason}") from None
