import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_store.errors import InvalidName, InvalidPrefix
from prefix_store.geometry import Stack
from prefix_store.prefix import Method, PrefixManifest, PrefixRef, PrefixVersion, Window, check_name
from tests.prefix_store.samples import BOTH, manifest

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
TAILS = st.none() | st.integers(1, 999_999_999) | st.from_regex(r"[a-z][a-z0-9._-]{0,63}", fullmatch=True)


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "a.b_c-d", "7b"])
def test_legal_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a" * 65, "a\n", "a/b", "a@1", "ä", "a b"])
def test_illegal_names(name):
    with pytest.raises(InvalidName, match="1 to 64"):
        check_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("support", PrefixRef("acme", "support")),
        ("support@3", PrefixRef("acme", "support", version=3)),
        ("support@prod", PrefixRef("acme", "support", alias="prod")),
        ("other/support@3", PrefixRef("other", "support", version=3)),
        ("3@3", PrefixRef("acme", "3", version=3)),
    ],
)
def test_references(text, expected):
    assert PrefixRef.parse(text, "acme") == expected


@pytest.mark.parametrize(
    "text",
    ["", "@3", "a@", "a@0", "a@03", "a@-1", "a@1@2", "a@1x", "/a", "a/", "a/b/c", "A", "a\n", "a@1\n", "a@9999999999"],
)
def test_malformed_references(text):
    with pytest.raises(InvalidName, match="reference must be"):
        PrefixRef.parse(text, "acme")


@given(tenant=NAMES, name=NAMES, tail=TAILS)
def test_a_reference_reads_back_as_it_was_written(tenant, name, tail):
    version, alias = (tail, None) if isinstance(tail, int) else (None, tail)
    ref = PrefixRef(tenant, name, version, alias)
    assert PrefixRef.parse(str(ref), "someone-else") == ref


@pytest.mark.parametrize("method", Method)
def test_manifest_round_trip(method):
    written = manifest(method, base_digest="a" * 64, window=Window.SLIDES, template="Say: {prompt}")
    assert PrefixManifest.from_json(written.to_json()) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"format": True}, "format must be 1, got True"),
        ({"method": "lora"}, "lora"),
        ({"method": []}, "manifest"),
        ({"geometry": {}}, "geometry"),
        ({"virtual_tokens": -1}, "virtual_tokens"),
        ({"virtual_tokens": True}, "virtual_tokens"),
        ({"virtual_tokens": 0, "position_offset": 0}, "virtual_tokens must be 0 for prefix_plus"),
        ({"position_offset": 1}, "position_offset must be 0 or virtual_tokens"),
        ({"base_digest": "A" * 64}, "base_digest"),
        ({"base_digest": "a" * 64 + "\n"}, "base_digest"),
        ({"window": "sometimes"}, "sometimes"),
        ({"query": "pre_rope"}, "post_rope"),
        ({"feature_map": "elu"}, "feature_map"),
        ({"template": "no place"}, "template"),
        ({"template": ""}, "template"),
        ({"template": 3}, "template"),
        ({"template": "{prompt}" + 20_000 * "x"}, "at most 20000 characters"),
        ({"template": "{prompt}{prompt}"}, "template"),
        ({"stacks": ["cross"]}, "a model without an encoder has only 'self', got \\['cross'\\]"),
        ({"surprise": 1}, "unknown \\['surprise'\\]"),
    ],
)
def test_manifest_refuses(change, message):
    with pytest.raises(InvalidPrefix, match=message):
        PrefixManifest.from_json({**manifest().to_json(), **change})


@pytest.mark.parametrize("stacks", [[], "self", ["self", "self"], ["middle"], [3], None, {"self": 1}])
def test_stacks_are_named_once_each(stacks):
    with pytest.raises(InvalidPrefix, match=r"stacks|middle|3"):
        PrefixManifest.from_json({**manifest(geometry=BOTH).to_json(), "stacks": stacks})


def test_stacks_belong_to_keys_and_values():
    soft = manifest(Method.PROMPT, geometry=BOTH, stacks=(Stack.ENCODER,))
    with pytest.raises(InvalidPrefix, match="belong to KV prefixes, not to prompt"):
        PrefixManifest.from_json(soft.to_json())


def test_one_set_of_stacks_is_one_manifest():
    whole = manifest(geometry=BOTH, stacks=tuple(Stack))
    data = whole.to_json()
    assert data["stacks"] == ["self", "cross", "encoder"]
    assert PrefixManifest.from_json({**data, "stacks": ["encoder", "self", "cross"]}) == whole
    assert "stacks" not in manifest(geometry=BOTH).to_json()
    assert PrefixManifest.from_json(manifest(geometry=BOTH).to_json()).stacks == (Stack.SELF,)


def test_manifest_refuses_a_missing_field():
    data = manifest().to_json()
    del data["window"]
    with pytest.raises(InvalidPrefix, match="missing \\['window'\\]"):
        PrefixManifest.from_json(data)


def test_manifest_refuses_what_is_no_object():
    with pytest.raises(InvalidPrefix, match="JSON object"):
        PrefixManifest.from_json([])


def test_a_version_refers_to_itself():
    version = PrefixVersion("acme", "support", 3, "d" * 64, Method.PREFIX, 5, 100, 0.0)
    assert str(version.ref) == "acme/support@3"
