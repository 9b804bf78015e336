from pathlib import Path

import pytest

from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from server import start
from server.settings import Settings
from tests.server import artefacts


def test_a_port_in_use_is_one_line() -> None:
    with start.listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            start.listen("127.0.0.1", port)


def test_without_a_key_only_this_machine_is_let_in(store: Store) -> None:
    assert start.check_access(Settings(host="127.0.0.1"), store) is True
    with pytest.raises(SystemExit, match="antefix key new"):
        start.check_access(Settings(host="0.0.0.0"), store)
    store.keys.create("acme", ["generate"])
    assert start.check_access(Settings(host="0.0.0.0"), store) is False


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
    store.prefixes.path(store.prefixes.resolve(PrefixRef("default", "lost"))).unlink()
    assert [version.name for version in start.fitting(store, frozen)] == ["fits"]
