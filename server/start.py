"""From the settings to a server that answers. Importing this takes seconds: torch and transformers."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from fastapi import FastAPI
from jinja2 import TemplateError, TemplateSyntaxError

from prefix_store import codec
from prefix_store.errors import AntefixError, InvalidPrefix, StoreCorrupt, StoreUnavailable
from prefix_store.model import frozen as models
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixVersion
from prefix_store.store import Store
from prefix_store.tenants import DEFAULT_TENANT
from server import running, sizing, welcome
from server.api.drain import Drain
from server.app import create_app
from server.engine.engine import Engine
from server.engine.loop import EngineLoop
from server.engine.prefix_loader import PrefixLoader
from server.loading import Meanwhile
from server.scheduler.scheduler import Limits
from server.settings import Settings

BUNDLED_PREFIXES = models.BUNDLED.parent / "prefixes"
LOADED_PREFIXES_SHARE = 0.125  # of the machine's memory
# Only the linear layers are int8; what lies between them, and the keys and values, are this.
INT8, AROUND_INT8 = "int8", "bfloat16"
# Prefixes whose headers are read at the start to find some that fit.
LOOKED_AT = 50
# How often a store that does not answer yet is tried.
STORE_SECONDS = 1.0
MAKE_A_KEY = "antefix key new --tenant default --scope admin"
# Docker's and podman's mark on a container. There, the command would have to run with the server's settings.
CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
PROBE = {"role": "user", "content": "x"}


def serve(
    chosen: Settings,
    listener: socket.socket,
    meanwhile: Meanwhile,
    stop_loading: Callable[[], None],
    ready_fd: int | None = None,
) -> None:
    """Runs until a signal. Raises SystemExit with one line when it cannot start.

    `meanwhile` is told what is there already, and `stop_loading` leaves the listener to us. `ready_fd` is a descriptor
    of whoever supervises: a line comes once requests are taken.
    """
    transformers.logging.disable_progress_bar()
    try:
        store = open_store(chosen)
        meanwhile.store = True
        _serve(chosen, store, listener, stop_loading, ready_fd)
    except AntefixError as error:
        raise SystemExit(f"antefix: {error.message}") from None


def open_store(chosen: Settings) -> Store:
    """Waits for a server that does not answer yet. Raises StoreUnavailable for what no wait will mend."""
    said = False
    while True:
        try:
            return Store.open(chosen.store, chosen.blobs)
        except StoreUnavailable as error:
            if not error.may_pass:
                raise
            if not said:
                _say(f"waiting for the store: {error.message}")
            said = True
        time.sleep(STORE_SECONDS)


def _serve(
    chosen: Settings, store: Store, listener: socket.socket, stop_loading: Callable[[], None], ready_fd: int | None
) -> None:
    open_mode = check_access(chosen, store)
    drain = Drain(chosen.drain_seconds)
    app, loop, text = _prepare(chosen, store, drain, listener.getsockname()[1], open_mode=open_mode)
    stop_loading()

    def ready() -> None:
        _say(text)
        if ready_fd is not None:
            os.write(ready_fd, b"ready\n")
            os.close(ready_fd)

    running.run(app, listener, loop, drain, ready)


def _prepare(
    chosen: Settings, store: Store, drain: Drain, port: int, *, open_mode: bool
) -> tuple[FastAPI, EngineLoop, str]:
    """The slow part: the application, its engine, and what is said once it answers."""
    store.collect()
    frozen = _load_model(chosen)
    template = chat_template(chosen, frozen)
    if Path(chosen.model or models.BUNDLED).resolve() == models.BUNDLED:
        seed(store, BUNDLED_PREFIXES)
    engine = _start_engine(chosen, frozen)
    loop = EngineLoop(engine)
    loader = PrefixLoader(store.prefixes, frozen, int(LOADED_PREFIXES_SHARE * sizing.host_memory()))
    app = create_app(
        store,
        frozen,
        loop,
        loader,
        is_loopback=chosen.is_loopback,
        require_prefix=chosen.require_prefix,
        methods=chosen.method_names,
        max_upload_mb=chosen.max_upload_mb,
        counters_url=chosen.store,
        chat_template=template,
        drain=drain,
    )
    address = f"http://{_bracketed(chosen.host)}:{port}"
    prefixes = fitting(store, frozen)
    free_slots = engine.scheduler.slots.total - engine.scheduler.slots.used
    dtype = INT8 if engine.runner.int8 else str(frozen.dtype).removeprefix("torch.")
    text = welcome.text(address, frozen, prefixes, free_slots, dtype=dtype, open_mode=open_mode)
    return app, loop, text


def check_access(settings: Settings, store: Store) -> bool:
    """Whether the server will be open. Raises SystemExit where it would be open to more than this machine."""
    if store.keys.any():
        return False
    if not settings.is_loopback:
        how = MAKE_A_KEY
        if any(mark.exists() for mark in CONTAINER_MARKS):
            how = f"`make up` does, or: docker compose run --rm server {MAKE_A_KEY}"
        raise SystemExit(
            f"antefix: ANTEFIX_HOST={settings.host} without an API key would let anyone in; make a key first: {how}"
        )
    return True


def _load_model(chosen: Settings) -> FrozenModel:
    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = chosen.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    _say(f"loading the model {chosen.model or models.BUNDLED_NAME} ({dtype} on {device}) …")
    return models.load(
        chosen.model or models.BUNDLED,
        device=device,
        dtype=AROUND_INT8 if dtype == INT8 else dtype,
        name=chosen.model_name,
    )


def chat_template(chosen: Settings, frozen: FrozenModel) -> str | None:
    """The text of ANTEFIX_CHAT_TEMPLATE's file. Raises SystemExit if it cannot be read, or is no template."""
    if chosen.chat_template is None:
        return None
    try:
        template = chosen.chat_template.read_text(encoding="utf-8")
        frozen.tokenizer.apply_chat_template([PROBE], chat_template=template, tokenize=False)
    except (OSError, UnicodeError, TemplateSyntaxError) as error:
        raise SystemExit(f"antefix: ANTEFIX_CHAT_TEMPLATE={chosen.chat_template}: {error}") from None
    except TemplateError:
        pass  # a template may refuse the probe, and take other messages
    return template


def seed(store: Store, folder: Path) -> None:
    """Publishes bundled prefixes once; what the default tenant has replaced or deleted since stays so."""
    for path in sorted(folder.glob("*.safetensors")):
        if not store.prefixes.ever_published(DEFAULT_TENANT, path.stem):
            store.prefixes.save(DEFAULT_TENANT, path.stem, *codec.decode(path))


def fitting(store: Store, frozen: FrozenModel) -> list[PrefixVersion]:
    """The default tenant's first prefixes that this model can serve; the store may hold another model's too."""
    found: list[PrefixVersion] = []
    for version in store.prefixes.page(DEFAULT_TENANT, limit=LOOKED_AT):
        with suppress(InvalidPrefix, StoreCorrupt):
            with store.prefixes.file(version) as path:
                manifest = codec.read_manifest(path)
            frozen.check_fits(manifest)
            found.append(version)
        if len(found) > welcome.SHOWN:
            break
    return found


def _start_engine(chosen: Settings, frozen: FrozenModel) -> Engine:
    if chosen.compile and frozen.device.type != "cuda":
        raise SystemExit(f"antefix: ANTEFIX_COMPILE=true is for CUDA, and the model is on {frozen.device.type}")
    _say("self-test: comparing the engine with the plain model …")
    limits = Limits(chosen.kv_slots, chosen.max_batch, chosen.step_tokens, frozen.context_length, chosen.max_waiting)
    return sizing.start(frozen, limits, int8=chosen.dtype == INT8, compiled=chosen.compile, say=_say)


def _say(text: str) -> None:
    """For whoever started it; logs go to stderr."""
    print(text, flush=True)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
