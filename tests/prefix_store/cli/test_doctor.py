from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import Result

from prefix_store import layout
from prefix_store.cli.checks import finding, machine, model, storage
from prefix_store.cli.checks.finding import Finding, Level
from prefix_store.store import Store
from tests import redis_server
from tests.e2e.processes import free_port
from tests.models import save_tiny
from tests.prefix_store.cli.conftest import Antefix
from tests.prefix_store.samples import manifest, tensors

SECRET = "hunter2-secret"
# On whom each of these depends is none of the store's tests' business; they have tests of their own.
ELSEWHERE = {"versions": machine, "settings": machine, "device": machine, "ports": machine, "look": model}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name in [name for name in os.environ if name.startswith("ANTEFIX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ANTEFIX_STORE", f"sqlite:///{tmp_path}/store.db")
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened  # stays open: a server may run meanwhile
    opened.close()


@pytest.fixture
def of_the_store(antefix: Antefix, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Result]:
    """The command without what it says of the machine and the model."""
    for name, module in ELSEWHERE.items():
        monkeypatch.setattr(module, name, lambda *_: iter(()))
    return lambda: antefix("doctor")


def save(store: Store, name: str = "support", seed: int = 0) -> str:
    digest: str = store.prefixes.save("acme", name, manifest(), tensors(manifest(), seed)).digest
    return digest


def lines(result: Result, *levels: Level) -> list[str]:
    return [line for line in result.stdout.splitlines() if Level(line.partition(":")[0]) in levels]


def only(found: Iterator[Finding]) -> Finding:
    [one] = found
    return one


# all of it


def test_a_machine_where_all_is_well(antefix: Antefix, store: Store, tmp_path: Path) -> None:
    save(store)
    store.jobs.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {})
    result = antefix("doctor")
    assert (result.exit_code, result.stderr) == (0, "files: 2 of 2\n"), result.stdout
    subjects = [line.split(":")[1].strip() for line in result.stdout.splitlines()]
    for subject in (
        "versions",
        "settings",
        "device",
        "model",
        "disk",
        "ports",
        "store",
        "permissions",
        "clock",
        "access",
        "contents",
    ):
        assert subject in subjects
    assert not lines(result, Level.PROBLEM)


def test_each_line_says_how_bad_it_is() -> None:
    assert str(finding.ok("a", "fine")) == "ok: a: fine"
    assert str(finding.warning("b", "do this")) == "warning: b: do this"
    assert str(finding.problem("c", "do that")) == "problem: c: do that"


# the store


def test_a_store_that_is_whole(of_the_store: Callable[[], Result], store: Store) -> None:
    save(store)
    result = of_the_store()
    assert (result.exit_code, lines(result, Level.PROBLEM)) == (0, [])
    for said in ("ok: store: reached, and writable", "ok: contents: ", "ok: permissions: ", "ok: clock: ", "open mode"):
        assert said in result.stdout


def test_where_there_is_no_store_none_is_made(
    of_the_store: Callable[[], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTEFIX_STORE", f"sqlite:///{tmp_path}/absent/store.db")
    result = of_the_store()
    assert result.exit_code == 0
    assert any(
        f"there is none at sqlite:///{tmp_path}/absent/store.db" in line for line in lines(result, Level.WARNING)
    )
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_reached_is_a_problem_without_its_password(
    of_the_store: Callable[[], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTEFIX_STORE", f"redis://someone:{SECRET}@127.0.0.1:1/0")
    result = of_the_store()
    assert result.exit_code == 1
    [line] = [line for line in lines(result, Level.PROBLEM) if "store" in line]
    assert "ANTEFIX_STORE" in line
    monkeypatch.setenv("ANTEFIX_STORE", f"redis://someone:{SECRET}@host:none/0")
    again = of_the_store()
    assert again.exit_code == 1
    assert SECRET not in result.stdout + result.stderr + again.stdout + again.stderr


def test_what_is_damaged_lost_or_miscounted_is_named(
    of_the_store: Callable[[], Result], tmp_path: Path, store: Store
) -> None:
    damaged, lost = save(store), save(store, "lost", seed=1)
    save(store, "whole", seed=2)
    files = {digest: tmp_path / "blobs" / "sha256" / digest[:2] / digest for digest in (damaged, lost)}
    files[damaged].write_bytes(b"something else")
    files[lost].unlink()
    usage = {"prefixes": 3, "versions": 3, "bytes": 1, "last_job": 0, "jobs": {}}
    store.backend.write(lambda transaction: transaction.put(layout.usage("acme"), usage))
    store.backend.write(lambda transaction: transaction.put(layout.name("acme", "odd"), {"last": 9, "current": 9}))
    result = of_the_store()
    faults = lines(result, Level.PROBLEM)
    assert (result.exit_code, len(faults)) == (1, 5)
    assert any("backup" in line and "upload" in line for line in lines(result, Level.WARNING))
    expected = ["lost@1: blob", "support@1: blob", "acme/odd: the current", "prefixes: counted 3, found 4"]
    for fault, said in zip(faults, [*expected, "bytes: counted 1"], strict=True):
        assert said in fault


def test_a_folder_that_cannot_be_written_is_a_problem(
    of_the_store: Callable[[], Result], store: Store, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "blobs" / "tmp")
    (tmp_path / "blobs" / "tmp").touch()  # nobody, not even root, makes a file in a file
    result = of_the_store()
    assert result.exit_code == 1
    assert any(line.startswith("problem: store: ") for line in lines(result, Level.PROBLEM))


def test_where_no_store_can_be_made_is_a_problem(
    of_the_store: Callable[[], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTEFIX_STORE", f"sqlite:///{tmp_path}/absent/store.db")
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and may(path, mode))
    result = of_the_store()
    [line] = lines(result, Level.PROBLEM)
    assert (result.exit_code, f"none can be made in {tmp_path}: run antefix as the user" in line) == (1, True)


def test_a_folder_without_rights_is_a_problem_that_says_whose_it_should_be(
    of_the_store: Callable[[], Result], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def refused(path: Path, *more: Any, **named: Any) -> None:
        if path.is_relative_to(tmp_path / "blobs"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *more, **named)

    monkeypatch.setattr(Path, "mkdir", refused)
    result = of_the_store()
    [line] = lines(result, Level.PROBLEM)
    assert (result.exit_code, f"chown -R, chmod u+rwX {tmp_path / 'blobs'}" in line) == (1, True)


def test_a_disk_that_fills_up_is_found_by_writing(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = storage._writable(store)
    assert (found.level, "No space left" in found.text) == (Level.PROBLEM, True)


def test_what_others_may_read_is_a_warning(of_the_store: Callable[[], Result], store: Store, tmp_path: Path) -> None:
    (tmp_path / "store.db").chmod(0o644)
    (tmp_path / "blobs").chmod(0o755)
    result = of_the_store()
    warned = lines(result, Level.WARNING)
    assert result.exit_code == 0
    for path in ("store.db", "blobs"):
        assert any(f"chmod -R go-rwx {tmp_path / path}" in line for line in warned)


def test_a_blob_folder_of_any_name_is_looked_at(
    of_the_store: Callable[[], Result], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "redis-blobs"
    (tmp_path / "blobs").rename(folder)
    monkeypatch.setenv("ANTEFIX_BLOBS", f"file://{folder}")
    folder.chmod(0o777)
    warned = lines(of_the_store(), Level.WARNING)
    assert any(f"chmod -R go-rwx {folder}" in line for line in warned)


def test_what_is_another_users_is_said(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    found = list(storage._permission(tmp_path / "store.db"))
    assert [each.level for each in found] == [Level.WARNING]
    assert f"is user {mine}'s, and this is user {mine + 1}" in found[0].text
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "chown" in next(storage._permission(tmp_path / "store.db")).text


def test_a_clock_that_differs_is_a_warning(tmp_path: Path) -> None:
    for shift, level in ((-90.0, Level.WARNING), (90.0, Level.WARNING), (1.0, Level.OK)):
        opened = Store.open(f"sqlite:///{tmp_path}/store.db", clock=lambda shift=shift: storage.time.time() + shift)
        found = only(storage._clock(opened))
        opened.close()
        assert found.level is level
        assert level is Level.OK or f"{shift:+.0f} s" in found.text


def test_who_gets_in(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage._access(store, "127.0.0.1").level is Level.OK
    refused = storage._access(store, "0.0.0.0")
    assert (refused.level, "antefix key new" in refused.text) == (Level.PROBLEM, True)
    presented, _ = store.keys.create("acme", ["generate"], 0.001)
    while storage._access(store, "0.0.0.0").level is not Level.WARNING:
        storage.time.sleep(0.01)
    store.keys.create("acme", ["generate"])
    found = storage._access(store, "example.org")
    assert (found.level, found.text) == (Level.OK, "2 keys; without one nobody gets in")
    assert presented not in found.text


def test_a_redis_that_may_forget_is_a_warning(
    of_the_store: Callable[[], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if redis_server.program("redis") is None:
        pytest.skip("no redis-server for this machine")
    with redis_server.running("redis", tmp_path) as server:
        monkeypatch.setenv("ANTEFIX_STORE", server.url)
        opened = Store.open(server.url)
        save(opened)
        assert lines(of_the_store(), Level.WARNING, Level.PROBLEM) == []
        opened.backend._client.config_set("appendonly", "no")
        opened.backend._client.config_set("maxmemory-policy", "allkeys-lru")
        opened.close()
        result = of_the_store()
    warnings = lines(result, Level.WARNING)
    assert result.exit_code == 0
    assert "appendonly is 'no' and should be 'yes'" in warnings[0]
    assert "maxmemory-policy is 'allkeys-lru' and should be 'noeviction'" in warnings[1]


# the model


def test_a_model_that_loads(tmp_path: Path) -> None:
    found = only(model.look(str(save_tiny("llama", tmp_path / "tiny"))))
    assert (found.level, "tiny loads: llama, " in found.text) == (Level.OK, True)


def test_a_model_that_does_not(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}})
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, said in ((folder, "rope_type"), (empty, "cannot load"), (tmp_path / "absent", "no such folder")):
        found = only(model.look(str(source)))
        assert (found.level, said in found.text, "ANTEFIX_MODEL" in found.text) == (Level.PROBLEM, True, True)


def test_a_model_larger_than_what_is_free_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal: 100 kB\nMemAvailable:       1 kB\n")
    monkeypatch.setattr(model, "MEMORY", memory)
    found = only(model.look(str(save_tiny("llama", tmp_path / "tiny"))))
    assert (found.level, "1.02 KB of memory are free" in found.text) == (Level.WARNING, True)


# the machine


@pytest.mark.parametrize(
    ("requires", "said"),
    [
        (["torch>=900"], "torch is "),
        (["no-such-package-at-all>=1"], "no-such-package-at-all is missing"),
        (["torch>=2", 'no-such-package-at-all; extra == "dev"', "no-such-thing; python_version < '3'"], None),
    ],
)
def test_packages_are_held_to_their_ranges(
    monkeypatch: pytest.MonkeyPatch, requires: list[str], said: str | None
) -> None:
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda name: requires)
    found = only(machine.versions())
    assert found.level is (Level.OK if said is None else Level.PROBLEM)
    assert said is None or said in found.text


def test_python_is_held_to_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.9.1")
    found = [each for each in machine.versions() if each.level is Level.PROBLEM]
    assert "Python 3.9.1, not >=3.11" in found[0].text


@pytest.mark.parametrize(
    ("free", "level"), [(1 << 20, Level.PROBLEM), (500 << 20, Level.WARNING), (50 << 30, Level.OK)]
)
def test_room_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, level: Level) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = list(machine.disks([tmp_path / "to" / "be" / "made"]))
    assert {each.level for each in found} == {level}


def test_no_place_for_temporary_files_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", none)
    found = only(machine.disks([]))
    assert (found.level, "TMPDIR" in found.text) == (Level.PROBLEM, True)


def test_a_gpu_that_is_asked_for_and_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = only(machine.device("cuda:1"))
    assert (found.level, "ANTEFIX_DEVICE=cuda:1" in found.text) == (Level.PROBLEM, True)


def test_a_gpu_that_torch_does_not_see_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_kernel", lambda: finding.ok("device", "kernel"))
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/" + name)
    levels = [each.level for each in machine.device("auto")]
    assert levels == [Level.WARNING, Level.OK, Level.OK]


def test_a_gpu_is_told_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6_000_000_000, 8_000_000_000))
    found = only(machine.device("cuda"))
    assert (found.level, "A GPU, 6 GB of 8 GB free" in found.text) == (Level.OK, True)


def test_without_a_compiler_the_kernel_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "KERNEL", "print(False)")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert "install one of cc, gcc, clang" in machine._kernel().text
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    assert "does not compile" in machine._kernel().text
    monkeypatch.setattr(machine, "KERNEL", "raise ImportError")
    assert machine._kernel().level is Level.PROBLEM


class Answering(BaseHTTPRequestHandler):
    text = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.text.encode() if self.path == "/healthz" else b"something else")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("text", "level"),
    [('{"status":"ok"}', Level.OK), ('{"status": "ok"}', Level.OK), ("hello", Level.PROBLEM), ("[1]", Level.PROBLEM)],
)
def test_a_port_that_is_taken_is_fine_if_it_is_by_us(text: str, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    handler = type("Handler", (Answering,), {"text": text})
    with HTTPServer(("127.0.0.1", 0), handler) as taken:
        threading.Thread(target=taken.serve_forever, daemon=True).start()
        port = str(taken.server_address[1])
        server, worker = machine.ports({"ANTEFIX_PORT": port, "ANTEFIX_WORKER_METRICS_PORT": "0"})
        taken.shutdown()
    assert (server.level, worker.level) == (level, Level.OK)
    assert level is Level.OK or "set ANTEFIX_PORT to another" in server.text


def test_the_workers_port_is_only_a_warning_and_no_number_is_a_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {"ANTEFIX_PORT": "many", "ANTEFIX_WORKER_METRICS_PORT": str(taken.getsockname()[1])}
        taken.settimeout(0)
        machine_seconds, machine.ANSWER_SECONDS = machine.ANSWER_SECONDS, 0.2
        try:
            server, worker = machine.ports(environment)
        finally:
            machine.ANSWER_SECONDS = machine_seconds
    assert (server.level, worker.level) == (Level.PROBLEM, Level.WARNING)


def test_two_that_would_listen_at_one_place_are_a_problem() -> None:
    found = list(machine.ports({"ANTEFIX_PORT": "0", "ANTEFIX_WORKER_METRICS_PORT": "0"}))
    assert [each.level for each in found] == [Level.OK, Level.OK]
    port = str(free_port())
    both = {"ANTEFIX_PORT": port, "ANTEFIX_WORKER_METRICS_PORT": port}
    for host in ("127.0.0.1", "0.0.0.0"):
        one = next(machine.ports({**both, "ANTEFIX_HOST": host}))
        assert (one.level, "are both" in one.text) == (Level.PROBLEM, True)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_this_machine_is_a_problem(host: str) -> None:
    server, _ = machine.ports({"ANTEFIX_HOST": host, "ANTEFIX_PORT": "0", "ANTEFIX_WORKER_METRICS_PORT": "0"})
    assert (server.level, f"ANTEFIX_HOST={host} is no address of this machine" in server.text) == (Level.PROBLEM, True)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ANTEFIX_DTYPE", "foo", "ANTEFIX_DTYPE='foo'"),
        ("ANTEFIX_MAX_BATCH", "0", "ANTEFIX_MAX_BATCH='0'"),
        ("ANTEFIX_KV_SLOT", "5", "did you mean ANTEFIX_KV_SLOTS?"),
        ("ANTEFIX_DEVICE", "gpu", "ANTEFIX_DEVICE='gpu'"),
        ("ANTEFIX_TRAIN_MEMORY_MB", "-1", "ANTEFIX_TRAIN_MEMORY_MB='-1'"),
    ],
)
def test_a_setting_that_the_server_or_the_worker_refuses_is_a_problem(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    found = only(machine.settings())
    assert (found.level, said in found.text) == (Level.PROBLEM, True), found.text


def test_the_command_names_no_secret(
    antefix: Antefix, store: Store, monkeypatch: pytest.MonkeyPatch, of_the_store: Callable[[], Result]
) -> None:
    presented, _ = store.keys.create("acme", ["admin"])
    monkeypatch.setenv("ANTEFIX_API_KEY", presented)
    result = of_the_store()
    assert result.exit_code == 0
    assert presented not in result.stdout + result.stderr
