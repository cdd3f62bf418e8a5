"""When kernels run in Triton's interpreter."""

import importlib.util

import pytest

from isofast_kernels import dispatch


@pytest.mark.parametrize("word", ["1", "true", "ON", "yes", "0", "false", "2", ""])
def test_what_asks_for_the_interpreter_is_what_triton_takes(word, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    def kernel():
        pass

    monkeypatch.setenv("TRITON_INTERPRET", word)
    # a copy: the module itself was imported under another word
    spec = importlib.util.spec_from_file_location("isofast_kernels.another", dispatch.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another.INTERPRET is isinstance(triton.jit(kernel), InterpretedFunction)
