from server.api.replies import fingerprint


def test_a_fingerprint_is_that_of_both_digests() -> None:
    found = {fingerprint(base, prefix) for base in ("a", "b") for prefix in (None, "a", "b")}
    assert len(found) == 6
    assert fingerprint("a", "b") == fingerprint("a", "b")
    assert fingerprint("a", "b").startswith("fp_")
