"""Progress of long jobs in a log."""

import pytest

from isofast.data.bar import Bar


@pytest.mark.parametrize("leave", [True, False])
def test_a_log_has_a_line_a_minute(leave, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for count in (59, 150):
        for _ in Bar(range(count), "decoding images", leave=leave):
            now[0] += 1.0
    assert capsys.readouterr().err.splitlines() == [
        "decoding images: 60/150, 01:00<01:30",
        "decoding images: 120/150, 02:00<00:30",
    ]


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(Bar(range(2), "short"))
    assert "\rshort: 100%|" in capsys.readouterr().err
