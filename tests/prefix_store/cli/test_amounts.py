import pytest
import typer

from prefix_store.cli import amounts


def test_times() -> None:
    for text, expected in {"90s": 90, "15m": 900, " 24h ": 86400, "30d": 2592000, "2w": 1209600}.items():
        assert amounts.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "5", "0s", "-1h", "1.5h", "h", "1y", "9999999s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        amounts.seconds(text)


def test_bounds() -> None:
    for text, expected in {"0": 0, "20": 20, "2K": 2048, "3M": 3 << 20, "1GiB": 1 << 30, "none": "none"}.items():
        assert amounts.bound(text) == expected


def test_sizes() -> None:
    for count, shown in {0: "0 B", 999: "999 B", 1000: "1 KB", 12_345_678: "12.3 MB", 4 * 10**12: "4 TB"}.items():
        assert amounts.size(count) == shown


def test_counts() -> None:
    pairs = ((1, "key"), (2, "key"), (0, "prefix"))
    assert [amounts.counted(count, what) for count, what in pairs] == ["1 key", "2 keys", "0 prefixes"]


def test_pairs() -> None:
    assert amounts.pairs(["a=1", "b=", "c=x=y"]) == {"a": "1", "b": "", "c": "x=y"}
    with pytest.raises(typer.BadParameter):
        amounts.pairs(["=x"])
