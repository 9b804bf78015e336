import asyncio
import socket
import threading
import time
from pathlib import Path

import pytest

from prefix_store.backends import redis_client
from prefix_store.errors import ModelUnsupported, StoreUnavailable
from prefix_store.model import frozen as models
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from server import loading, start
from server.engine import int8_linear
from server.settings import Settings
from tests import redis_server
from tests.models import save_tiny
from tests.server import artefacts


def test_a_port_in_use_is_one_line() -> None:
    with loading.listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            loading.listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_is_sent_goes_out_at_once(host: str) -> None:
    """A stream's token and a reply's body would otherwise wait 40 ms for the client to acknowledge what came before."""

    async def nodelay() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with loading.listen(host, 0) as listener:
            async with await asyncio.start_server(connected, sock=listener) as server:
                _, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
                found = await accepted
                writer.close()
                return found

    assert asyncio.run(nodelay())


@pytest.mark.parametrize("how", ["absent", "hangs"])
def test_a_redis_that_does_not_answer_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    if redis_server.program("redis") is None:
        pytest.skip("no redis-server for this machine")
    monkeypatch.setattr(start, "STORE_SECONDS", 0.05)
    monkeypatch.setattr(redis_client, "TIMEOUT_SECONDS", 0.2)
    with redis_server.running("redis", tmp_path) as server:
        comes = server.go_on
        if how == "hangs":
            server.hang()
        else:
            server.stop()
            comes = server.start
        later = threading.Timer(1.0, comes)
        later.start()
        begun = time.monotonic()
        opened = start.open_store(Settings(store=server.url))
        later.join()
        assert time.monotonic() - begun > 0.9
        opened.close()
    assert capsys.readouterr().out.count("waiting for the store") == 1


def test_what_waiting_does_not_mend_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for store in (f"sqlite:///{tmp_path}/file/store.db", "redis://127.0.0.1:x/0", "http://elsewhere"):
        with pytest.raises(StoreUnavailable):
            start.open_store(Settings(store=store))


def test_without_a_key_only_this_machine_is_let_in(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start.check_access(Settings(host="127.0.0.1"), store) is True
    monkeypatch.setattr(start, "CONTAINER_MARKS", (tmp_path / "mark",))
    with pytest.raises(SystemExit, match="make a key first: antefix key new"):
        start.check_access(Settings(host="0.0.0.0"), store)
    (tmp_path / "mark").touch()
    with pytest.raises(SystemExit, match="`make up` does, or: docker compose run --rm server antefix key new"):
        start.check_access(Settings(host="0.0.0.0"), store)
    store.keys.create("acme", ["generate"])
    assert start.check_access(Settings(host="0.0.0.0"), store) is False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_dtype_changes_neither_what_the_model_is_nor_which_prefixes_fit(dtype: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    chosen = Settings(model=str(folder), dtype=dtype, kv_slots=512)
    loaded = start._load_model(chosen)
    plain = models.load(folder)
    assert (loaded.digest, loaded.geometry) == (plain.digest, plain.geometry)
    engine = start._start_engine(chosen, loaded)
    assert engine.runner.int8 == (dtype == "int8")
    assert str(engine.pool.keys.dtype) == f"torch.{'bfloat16' if dtype == 'int8' else dtype}"


def test_int8_where_it_is_not_to_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(int8_linear, "works", lambda: False)
    chosen = Settings(model=str(save_tiny("llama", tmp_path / "model")), dtype="int8", kv_slots=512)
    with pytest.raises(ModelUnsupported, match="ask for bfloat16"):
        start._start_engine(chosen, start._load_model(chosen))


def test_compiling_a_model_on_a_cpu_is_one_line(frozen: FrozenModel) -> None:
    with pytest.raises(SystemExit, match="ANTEFIX_COMPILE=true is for CUDA, and the model is on cpu"):
        start._start_engine(Settings(compile=True), frozen)


def test_a_chat_template_is_the_text_of_a_file(frozen: FrozenModel, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    assert start.chat_template(Settings(), frozen) is None
    for template in ("{{ messages[0].content }} é", "{{ raise_exception('not these messages') }}"):
        path.write_text(template)
        assert start.chat_template(Settings(chat_template=path), frozen) == template


@pytest.mark.parametrize("content", [None, b"{% for %}", b"{{ messages", b"\xff"])
def test_a_chat_template_that_is_none_is_one_line(frozen: FrozenModel, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        start.chat_template(Settings(chat_template=path), frozen)
    assert str(caught.value).startswith(f"antefix: ANTEFIX_CHAT_TEMPLATE={path}: ")
    assert "\n" not in str(caught.value)


def test_bundled_prefixes_are_published_once(store: Store, frozen: FrozenModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(artefacts.native(frozen))
    start.seed(store, tmp_path)
    store.prefixes.delete(PrefixRef("default", "a"))
    start.seed(store, tmp_path)
    assert [version.name for version in store.prefixes.page("default")] == ["b"]
    assert store.prefixes.resolve(PrefixRef("default", "b")).version == 1


def test_no_folder_of_bundled_prefixes_is_none_to_publish(store: Store, tmp_path: Path) -> None:
    start.seed(store, tmp_path / "absent")
    assert store.prefixes.page("default") == []


def test_only_prefixes_that_fit_the_model_are_advertised(store: Store, frozen: FrozenModel, tmp_path: Path) -> None:
    (tmp_path / "fits.safetensors").write_bytes(artefacts.native(frozen))
    (tmp_path / "other.safetensors").write_bytes(artefacts.native(frozen, base_digest="0" * 64))
    (tmp_path / "lost.safetensors").write_bytes(artefacts.native(frozen, seed=1))
    start.seed(store, tmp_path)
    with store.prefixes.file(store.prefixes.resolve(PrefixRef("default", "lost"))) as path:
        path.unlink()
    assert [version.name for version in start.fitting(store, frozen)] == ["fits"]
