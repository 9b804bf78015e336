import io
import json
import zipfile
from typing import Any

import pytest
import torch
from httpx import Response
from starlette.testclient import TestClient

from prefix_store import codec
from prefix_store.formats import peft
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from prefix_store.tenants import DEFAULT_TENANT
from tests.models import tiny_frozen
from tests.server import artefacts
from tests.server.fakes import FakeLoop


def upload(
    client: TestClient, file: bytes, name: str = "support", template: str | None = None, **config: Any
) -> Response:
    parts = {"file": ("anything.bin", file)} | {part: ("adapter_config.json", data) for part, data in config.items()}
    fields = {"id": name} if template is None else {"id": name, "template": template}
    return client.post("/v1/prefixes", data=fields, files=parts)


def names(client: TestClient) -> list[str]:
    return [item["id"] for item in client.get("/v1/prefixes").json()["data"]]


def test_a_native_file_is_kept_byte_for_byte(client: TestClient, frozen: FrozenModel) -> None:
    data = artefacts.native(frozen)
    reply = upload(client, data)
    assert reply.status_code == 201
    stored = reply.json()
    assert (stored["id"], stored["version"], stored["method"], stored["virtual_tokens"]) == ("support", 1, "prefix", 4)
    assert stored["digest"] == codec.digest_of(data)
    assert stored["base_checked"] is True
    assert reply.headers["etag"] == f'"{stored["digest"]}"'
    assert client.get("/v1/prefixes/support/export").content == data
    assert client.get("/v1/prefixes/support").json() == stored


def test_a_peft_adapter_is_accepted_with_and_without_its_config(client: TestClient, frozen: FrozenModel) -> None:
    files = artefacts.adapter(frozen)
    weights, config = files[peft.TENSORS_FILE], files[peft.CONFIG_FILE]
    with_config, without = upload(client, weights, config=config).json(), upload(client, weights).json()
    assert (with_config["version"], without["version"]) == (1, 2)
    assert with_config["digest"] == without["digest"]
    assert with_config["base_checked"] is False


def test_the_config_may_be_a_plain_field(client: TestClient, frozen: FrozenModel) -> None:
    files = artefacts.adapter(frozen)
    fields = {"id": "support", "config": files[peft.CONFIG_FILE].decode()}
    reply = client.post("/v1/prefixes", data=fields, files={"file": ("f", files[peft.TENSORS_FILE])})
    assert reply.status_code == 201


def test_a_peft_export_holds_the_adapter_s_two_files(client: TestClient, frozen: FrozenModel) -> None:
    files = artefacts.adapter(frozen)
    upload(client, files[peft.TENSORS_FILE])
    reply = client.get("/v1/prefixes/support/export", params={"format": "peft"})
    assert reply.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files


def test_a_soft_prompt_s_adapter_goes_in_and_out(client: TestClient, frozen: FrozenModel, store: Store) -> None:
    upload(client, artefacts.prompt(frozen))
    with zipfile.ZipFile(io.BytesIO(client.get("/v1/prefixes/support/export?format=peft").content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for config in (files[peft.CONFIG_FILE], files[peft.CONFIG_FILE].replace(b"PROMPT_TUNING", b"P_TUNING")):
        stored = upload(client, files[peft.TENSORS_FILE], config=config).json()
        assert (stored["method"], stored["virtual_tokens"], stored["base_checked"]) == ("prompt", 4, False)
    versions = [store.prefixes.resolve(PrefixRef.parse(f"support@{number}", DEFAULT_TENANT)) for number in (1, 2, 3)]
    sent, *kept = (store.prefixes.read(version)[1]["embeds"] for version in versions)
    assert all(torch.equal(sent, embeds) for embeds in kept)


def test_a_peft_adapter_may_bring_a_template(client: TestClient, frozen: FrozenModel, loop: FakeLoop) -> None:
    files = artefacts.adapter(frozen)
    plain = upload(client, files[peft.TENSORS_FILE]).json()
    stored = upload(client, files[peft.TENSORS_FILE], template="F: {prompt}\n").json()
    assert stored["digest"] != plain["digest"]  # it changes what the prefix means
    for ref in ("support@1", "support@2"):
        client.post("/generate", json={"prompt": "hi", "prefix_id": ref})
    texts = [frozen.tokenizer.decode(request.prompt_ids, skip_special_tokens=True) for request in loop.requests]
    assert texts == ["hi", "F: hi\n"]


@pytest.mark.parametrize("template", ["", "no place", "{prompt} {prompt}", "x" * 20_000 + "{prompt}"])
def test_a_template_without_one_place_for_the_prompt_is_400(
    client: TestClient, frozen: FrozenModel, template: str
) -> None:
    reply = upload(client, artefacts.adapter(frozen)[peft.TENSORS_FILE], template=template)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "template")
    assert names(client) == []


def test_a_native_file_brings_its_template_itself(client: TestClient, frozen: FrozenModel) -> None:
    for own in (None, "Q: {prompt}"):
        reply = upload(client, artefacts.native(frozen, template=own), template="Q: {prompt}")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "template")
        assert "a native file carries its own template" in reply.json()["error"]["message"]


def test_a_template_may_come_as_a_file_too(client: TestClient, store: Store, frozen: FrozenModel) -> None:
    files = {"file": ("f", artefacts.adapter(frozen)[peft.TENSORS_FILE]), "template": ("t", b"Q: {prompt}")}
    assert client.post("/v1/prefixes", data={"id": "support"}, files=files).status_code == 201
    manifest, _ = store.prefixes.read(store.prefixes.resolve(PrefixRef("default", "support")))
    assert manifest.template == "Q: {prompt}"


def test_what_peft_cannot_say_is_400(client: TestClient, frozen: FrozenModel) -> None:
    upload(client, artefacts.native(frozen, template="Q: {prompt}"))
    reply = client.get("/v1/prefixes/support/export", params={"format": "peft"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "format")
    assert client.get("/v1/prefixes/support/export", params={"format": "gguf"}).status_code == 400


def test_a_memory_is_kept_and_has_no_peft_format(client: TestClient, frozen: FrozenModel) -> None:
    data = artefacts.memory(frozen, feature_map="gelu")
    assert upload(client, data, "plus").status_code == 201
    assert client.get("/v1/prefixes/plus/export").content == data
    reply = client.get("/v1/prefixes/plus/export", params={"format": "peft"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "format")
    assert "a prefix_plus prefix is neither keys and values nor embeddings" in reply.json()["error"]["message"]
    (listed,) = client.get("/v1/prefixes").json()["data"]
    assert (listed["method"], listed["virtual_tokens"]) == ("prefix_plus", 0)


def test_a_memory_of_another_shape_is_refused(client: TestClient) -> None:
    reply = upload(client, artefacts.memory(tiny_frozen("qwen3")))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "prefix_mismatch")


def test_every_upload_is_a_new_version_and_old_ones_stay(client: TestClient, frozen: FrozenModel) -> None:
    digests = [upload(client, artefacts.native(frozen, seed=seed)).json()["digest"] for seed in (1, 2)]
    shown = [client.get(f"/v1/prefixes/{ref}").json()["digest"] for ref in ("support@1", "support@2", "support")]
    assert shown == [*digests, digests[1]]


def test_the_digest_is_the_etag(client: TestClient, frozen: FrozenModel) -> None:
    etag = upload(client, artefacts.native(frozen)).headers["etag"]
    for known in (etag, f'W/{etag}, "other"', "*"):
        reply = client.get("/v1/prefixes/support", headers={"if-none-match": known})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", etag)
    assert client.get("/v1/prefixes/support", headers={"if-none-match": '"other"'}).status_code == 200


def test_lists_come_in_pages(client: TestClient, frozen: FrozenModel) -> None:
    for name in ("c", "a", "b"):
        upload(client, artefacts.native(frozen), name)
    first = client.get("/v1/prefixes", params={"limit": 2}).json()
    assert (first["object"], [item["id"] for item in first["data"]], first["has_more"]) == ("list", ["a", "b"], True)
    rest = client.get("/v1/prefixes", params={"limit": 2, "after": "b"}).json()
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (["c"], False)


def test_delete_takes_one_version_or_all(client: TestClient, frozen: FrozenModel) -> None:
    for seed in (1, 2, 3):
        upload(client, artefacts.native(frozen, seed=seed))
    assert client.delete("/v1/prefixes/support@3").json()["versions"] == [3]
    assert client.get("/v1/prefixes/support").json()["version"] == 2
    gone = client.delete("/v1/prefixes/support").json()
    assert (gone["id"], gone["deleted"], sorted(gone["versions"])) == ("support", True, [1, 2])
    assert client.get("/v1/prefixes/support").status_code == 404
    assert client.delete("/v1/prefixes/support").status_code == 404


@pytest.mark.parametrize("flaw", artefacts.damaged(tiny_frozen("llama")))
def test_a_bad_file_is_refused_and_leaves_nothing(
    client: TestClient, frozen: FrozenModel, store: Store, flaw: str
) -> None:
    reply = upload(client, artefacts.damaged(frozen)[flaw])
    found = reply.json()["error"]
    assert (reply.status_code, found["type"]) == (400, "invalid_request_error"), reply.text
    assert found["code"] == ("prefix_mismatch" if flaw == "another base model" else "invalid_prefix")
    assert names(client) == []
    assert not store.prefixes.ever_published("default", "support")
    assert f'antefix_upload_rejected_total{{code="{found["code"]}"}} 1.0' in client.get("/metrics").text


def test_a_file_for_another_shape_says_what_was_expected_and_what_came(client: TestClient) -> None:
    other = tiny_frozen("qwen3")
    said = {
        "head_dim: expected 8, got 16": upload(client, artefacts.native(other)),
        "= 96 columns, got 192": upload(client, artefacts.adapter(other)[peft.TENSORS_FILE]),
    }
    for text, reply in said.items():
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "prefix_mismatch")
        assert text in reply.json()["error"]["message"]


@pytest.mark.parametrize("config", [b"", b"{", b'{"peft_type": "LORA"}', b"[" * 70_000])
def test_a_bad_config_is_400(client: TestClient, frozen: FrozenModel, config: bytes) -> None:
    reply = upload(client, artefacts.adapter(frozen)[peft.TENSORS_FILE], config=config)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "config")


@pytest.mark.parametrize("name", ["", "Support", "a/b", "../x", "a\n", ".hidden", "x" * 65, "tiny-llama"])
def test_a_name_must_be_legal_and_not_the_model_s(client: TestClient, frozen: FrozenModel, name: str) -> None:
    reply = upload(client, artefacts.native(frozen), name)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_name")


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ({}, {"file": ("f", b"x")}),
        ({"id": "a"}, {}),
        ({"id": "a", "file": "not a file"}, {"config": ("c", b"{}")}),
        ({"id": "a", "nmae": "b"}, {"file": ("f", b"x")}),
        ({"id": "x" * 100_000}, {"file": ("f", b"x")}),
        ({"id": "a"}, [("file", ("f", b"x"))] * 3),
    ],
)
def test_a_form_with_other_parts_is_400(client: TestClient, fields: dict[str, str], files: Any) -> None:
    reply = client.post("/v1/prefixes", data=fields, files=files)
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_no_form_is_400(client: TestClient) -> None:
    for headers in ({}, {"content-type": "multipart/form-data"}, {"content-type": "application/json"}):
        assert client.post("/v1/prefixes", content=json.dumps({"id": "a"}), headers=headers).status_code == 400


def test_the_route_may_be_called_with_the_full_reference(client: TestClient, frozen: FrozenModel) -> None:
    upload(client, artefacts.native(frozen))
    assert client.get("/v1/prefixes/default/support@1").json()["id"] == "support"
    assert client.get("/v1/prefixes/default%2Fsupport").json()["id"] == "support"


def test_a_part_given_twice_is_refused(client: TestClient, frozen: FrozenModel) -> None:
    twice = [("file", ("a", b"x")), ("file", ("b", b"x"))]
    reply = client.post("/v1/prefixes", data={"id": "twice"}, files=twice)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "file")


@pytest.mark.parametrize("charset", ["undefined", "punycode", "utf-7", "unicode-escape"])
def test_strange_charsets_are_a_400(client: TestClient, charset: str) -> None:
    body = b'--X\r\nContent-Disposition: form-data; name="\\ud800+2AA-"\r\n\r\n\\ud800+2AA-\r\n--X--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=X; charset={charset}"}
    reply = client.post("/v1/prefixes", content=body, headers=headers)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]
