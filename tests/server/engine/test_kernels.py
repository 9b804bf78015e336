import pytest

from server.engine import compiled, fused, int8_rows, kernels
from server.engine.attention import native


def test_what_was_compiled_ahead_is_what_the_engine_loads(monkeypatch, tmp_path, capsys):
    """Another name, or a file left out, would be another library, which cannot be made without a compiler."""
    monkeypatch.setattr(compiled, "_cache", lambda: tmp_path / "cache")
    kernels.main()
    if "cannot" in capsys.readouterr().out:
        pytest.skip("no C compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    for module in (native, fused, int8_rows):
        assert module._library.__wrapped__() is not None, module.__name__
    assert len(list((tmp_path / "cache").iterdir())) == len(kernels.KERNELS)
