"""The compose file keeps what docs/deploy.md says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefix_store.tenants import SCOPES
from trainer.__main__ import GRACE_SECONDS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text("utf-8")
PAGE = (ROOT / "docs" / "deploy.md").read_text("utf-8")
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
COMPOSE: dict[str, Any] = yaml.safe_load(VARIABLE.sub(lambda match: match[2], TEXT))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SERVICES[request.param]


def test_every_container_is_hardened(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(int(number) > 0 for number in service["user"].split(":")), "the number, which no image can change"


def test_every_container_is_watched_and_started_again(service: dict[str, Any]) -> None:
    assert {"test", "start_period", "interval", "timeout"} <= service["healthcheck"].keys()
    assert service["restart"] == "unless-stopped"


def test_no_port_is_open_beyond_this_machine(service: dict[str, Any]) -> None:
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_nothing_outside_reaches_redis() -> None:
    assert "ports" not in SERVICES["redis"]
    assert SERVICES["redis"]["networks"] == ["store"]
    assert COMPOSE["networks"]["store"] == {"internal": True}
    assert {name for name, one in SERVICES.items() if "store" in one["networks"]} == {"redis", "server", "trainer"}


def test_images_are_built_here_or_pinned(service: dict[str, Any]) -> None:
    assert "build" in service or re.search(r":v?\d+\.\d+", service["image"])


def test_every_base_image_is_pinned() -> None:
    for path in (ROOT / "docker" / "Dockerfile", ROOT / "docker" / "edge" / "Dockerfile"):
        bases = re.findall(r"^FROM (\S+)(?: AS (\w+))?", path.read_text("utf-8"), re.MULTILINE)
        stages = {name for _, name in bases}
        assert all(base in stages or re.search(r":\d+\.\d+", base) for base, _ in bases), path


def test_what_ends_slowly_has_the_time_to() -> None:
    for name in ("server", "trainer", "redis"):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > 2 * GRACE_SECONDS


def test_the_page_names_every_service_profile_variable_and_volume() -> None:
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}
    variables = {match[1] for match in VARIABLE.finditer(TEXT)}
    for name in {*SERVICES, *profiles, *variables}:
        assert f"`{name}" in PAGE or f" {name}=" in PAGE, name
    assert set(re.findall(r"antefix_(\w+):", PAGE)) == {"redis", "data"} <= COMPOSE["volumes"].keys()


@pytest.mark.parametrize(
    ("address", "outside"), [("127.0.0.1:8443", ":8443"), ("8443", ":8443"), ("0.0.0.0:443", ""), ("443", "")]
)
def test_the_edge_sends_browsers_to_the_port_that_is_open_outside(address: str, outside: str) -> None:
    text = (ROOT / "docker" / "edge" / "Caddyfile").read_text("utf-8")
    assert "auto_https disable_redirects" in text
    assert "redir https://{host}{outside}{uri}" in text
    rules = re.findall(r'^\t\t~(\S+) "(.*)"$', text.partition("map {$EDGE_HTTPS:443} {outside}")[2], re.MULTILINE)
    matches = ((re.search(pattern, address), made) for pattern, made in rules)
    found = next(made.replace("${1}", match[1] if match.groups() else "") for match, made in matches if match)
    assert found == outside
    (published, _) = SERVICES["edge"]["ports"]
    assert published == SERVICES["edge"]["environment"]["EDGE_HTTPS"] + ":443"


def test_the_gpu_file_changes_services_that_there_are() -> None:
    changed = yaml.safe_load((ROOT / "docker" / "gpu.yml").read_text("utf-8"))["services"]
    assert changed.keys() == {"server", "trainer"}
    for name, service in changed.items():
        assert service["build"] == {"args": {"TORCH": "cuda"}}
        assert service["image"] != SERVICES[name]["image"], "or the next `make up` would find the other build"
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_secrets_lie_where_make_up_puts_them() -> None:
    script = (ROOT / "docker" / "up").read_text("utf-8")
    for secret in COMPOSE["secrets"].values():
        folder, _, name = secret["file"].rpartition("/")
        assert f"value SECRETS {folder})" in script
        assert f'"$SECRETS/{name}"' in script
    scopes = re.findall(r'^ *key "\$SECRETS/(\S+)" (\S+) (\d+)$', script, re.MULTILINE)
    assert scopes == [("admin.key", "admin", "600"), ("metrics.key", "metrics", "644")]
    assert {scope for _, scope, _ in scopes} <= set(SCOPES)
