"""Progress of long jobs in a log."""

import time

import pytest

from isofast.data.bar import Bar


@pytest.mark.parametrize("leave", [True, False])
def test_a_log_has_a_line_now_and_then(leave, monkeypatch, capsys):
    monkeypatch.setattr("isofast.data.bar._LINE_EVERY_S", 0.2)
    for _ in Bar(range(2), "short", leave=leave):
        time.sleep(0.01)
    assert capsys.readouterr().err == ""
    for _ in Bar(range(1200), "decoding images", leave=leave):
        time.sleep(0.0005)
    first, *more = capsys.readouterr().err.splitlines()
    assert first.startswith("decoding images: ") and "/1200, 00:0" in first and 0 < len(more) < 200
