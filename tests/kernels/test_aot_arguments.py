"""What `python -m isofast_kernels.aot` takes and refuses; nothing is compiled here."""

import pytest

from isofast_kernels import aot


def test_targets_may_have_spaces(capsys, monkeypatch):
    def unmeasured(build, capability):
        return aot.Usage(build.name, capability, registers=32, spills=0, stack=0, shared=0)

    monkeypatch.setattr(aot, "measure", unmeasured)
    assert aot.main(["--targets", "sm_90, sm_80", "--only", "finish D=32", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "sm_90" in printed and "sm_80" in printed and "2 kernels" in printed


def test_the_interpreter_leaves_nothing_to_compile(capsys, monkeypatch):
    monkeypatch.setattr(aot, "INTERPRET", True)
    with pytest.raises(SystemExit) as stopped:
        aot.main([])
    assert stopped.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
