"""This machine: packages, disks, processors, and the ports that are asked for."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from prefix_store.cli.amounts import size
from prefix_store.cli.checks.finding import Finding, ok, problem, warning

PACKAGE = "antefix"
LITTLE_BYTES, FEW_BYTES = 100 << 20, 1 << 30
KERNEL = "import torch; from server.engine.attention import native; print(native.is_available(torch.float32))"
KERNEL_SECONDS = 180.0
SETTINGS = "from {package} import settings; settings.read()"
SETTINGS_SECONDS = 60.0
COMPILERS = ("cc", "gcc", "clang")
ANSWER_SECONDS = 3.0


def versions() -> Iterator[Finding]:
    """Python and every package against the ranges that this one was made for."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
        wanted = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        yield warning("versions", "antefix is not installed, so nothing says what it needs: pip install -e .")
        return
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    python = SpecifierSet(metadata["Requires-Python"] or "")
    wrong = [] if python.contains(platform.python_version()) else [f"Python {platform.python_version()}, not {python}"]
    for each in needed:
        try:
            there = importlib.metadata.version(each.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{each.name} is missing")
            continue
        if not each.specifier.contains(there, prereleases=True):
            wrong.append(f"{each.name} is {there}, not {each.specifier}")
    yield from (problem("versions", f"{line}: install the lock again (make, or pip install -e .)") for line in wrong)
    if not wrong:
        own = importlib.metadata.version(PACKAGE)
        yield ok("versions", f"antefix {own}, and {len(needed)} packages within its ranges")


def settings() -> Iterator[Finding]:
    """The variables, read by those who will read them: the server and the worker, each in a process of its own."""
    said: list[str] = []
    for package in ("server", "trainer"):
        command = [sys.executable, "-c", SETTINGS.format(package=package)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SETTINGS_SECONDS, check=False)
        except subprocess.SubprocessError as error:
            yield problem(
                "settings", f"the {package}'s cannot be read: {type(error).__name__}; try python -m {package}"
            )
            return
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        said += [lines[-1].partition(": ")[2] or lines[-1]] if done.returncode else []
    yield from (problem("settings", f"{line}: docs/api.md lists what there is") for line in dict.fromkeys(said))
    if not said:
        yield ok("settings", "the server and the worker take them")


def disks(folders: list[Path]) -> Iterator[Finding]:
    """Room where the store, its blobs and temporary files lie, and whether these can be written."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            places = [*folders, Path(file.name).parent]
    except OSError as error:
        yield problem(
            "disk", f"no temporary file can be written ({error.strerror}): set TMPDIR to a folder of your own"
        )
        places = folders
    seen = set()
    for place in places:
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        if (device := there.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(there).free
        if free < LITTLE_BYTES:
            yield problem("disk", f"{there} has {size(free)} left, and uploads and checkpoints fail: make room")
        elif free < FEW_BYTES:
            yield warning("disk", f"{there} has {size(free)} left: make room before uploads and checkpoints fail")
        else:
            yield ok("disk", f"{there} has {size(free)} left")


def device(wanted: str) -> Iterator[Finding]:
    """What it computes with; `wanted` as ANTEFIX_DEVICE has it."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield ok(
            "device", f"{torch.cuda.get_device_name()}, {size(free)} of {size(total)} free, CUDA {torch.version.cuda}"
        )
    elif wanted.startswith("cuda"):
        yield problem("device", f"ANTEFIX_DEVICE={wanted}, and torch {torch.__version__} sees no GPU: {_no_gpu()}")
    elif shutil.which("nvidia-smi") is not None:
        yield warning(
            "device", f"this machine seems to have a GPU, and torch {torch.__version__} sees none: {_no_gpu()}"
        )
    if not wanted.startswith("cuda"):
        yield ok(
            "device", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
        )
        yield _kernel()


def ports(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the server and the worker's metrics could listen, or do."""
    host = environment.get("ANTEFIX_HOST") or "127.0.0.1"
    asked = (
        ("ANTEFIX_PORT", host, "8000", problem),
        ("ANTEFIX_WORKER_METRICS_PORT", environment.get("ANTEFIX_WORKER_METRICS_HOST") or "127.0.0.1", "8001", warning),
    )
    yield from _the_same(*((name, address, environment.get(name) or default) for name, address, default, _ in asked))
    for name, address, default, bad in asked:
        text = environment.get(name) or default
        if not text.isascii() or not text.isdigit() or int(text) > 65535:
            yield problem("ports", f"{name}={text[:20]!r} is no port: set it to a number up to 65535")
        elif not _is_ours(address):
            name = name.replace("PORT", "HOST")
            yield bad("ports", f"{name}={address} is no address of this machine: set it to one, or to 127.0.0.1")
        elif int(text) == 0 or _is_free(address, int(text)):
            yield ok("ports", f"{address}:{text} is free")
        elif _is_antefix(address, int(text)):
            yield ok("ports", f"antefix answers at {address}:{text}")
        else:
            yield bad("ports", f"{address}:{text} cannot be had, another program may have it: set {name} to another")


def _the_same(*asked: tuple[str, str, str]) -> Iterator[Finding]:
    """Of two that would listen at one place, the second cannot."""
    (first, host, port), (second, other_host, other_port) = asked
    meet = host == other_host or {host, other_host} & {"0.0.0.0", "::"}
    if port == other_port != "0" and meet:
        yield problem("ports", f"{first} and {second} are both {port}: set one of them to another")


def _no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "it is the CPU build; install the CUDA build of torch"
    return f"see whether nvidia-smi works, and whether its driver is new enough for CUDA {torch.version.cuda}"


def _kernel() -> Finding:
    """Asks the server's own code, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", KERNEL], capture_output=True, text=True, timeout=KERNEL_SECONDS, check=True
        )
    except subprocess.SubprocessError as error:
        return problem(
            "device", f"the server's code does not start: {type(error).__name__}; try python -m server --help"
        )
    if done.stdout.strip() == "True":
        return ok("device", "the native attention kernel is compiled, and computes what torch does")
    if not any(map(shutil.which, COMPILERS)):
        return warning(
            "device", f"attention is slower without the native kernel: install one of {', '.join(COMPILERS)}"
        )
    return warning(
        "device",
        "attention is slower, as the native kernel does not compile or does not compute what torch does: see whether "
        "the compiler knows -fopenmp and -march=native, and whether ~/.cache/antefix can be written",
    )


def _is_ours(host: str) -> bool:
    """Whether a server could listen there, at whatever port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            return error.errno not in (errno.EADDRINUSE, errno.EACCES)
    return True


def _is_antefix(host: str, port: int) -> bool:
    """Whether what listens there has our metrics or our health route."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    name = f"[{host}]" if ":" in host else host
    try:
        # by no proxy, which would look for this machine's ports on its own
        with httpx.Client(base_url=f"http://{name}:{port}", timeout=ANSWER_SECONDS, trust_env=False) as client:
            with suppress(ValueError):
                if client.get("/healthz").json() == {"status": "ok"}:
                    return True
            return "antefix_worker_" in client.get("/metrics").text
    except httpx.HTTPError:
        return False
