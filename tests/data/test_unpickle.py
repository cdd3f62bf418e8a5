"""Pickles of arrays of bytes are read, and nothing else is."""

import pickle

import numpy as np
import pytest

from isofast.data.unpickle import load_plain


@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_arrays(order: str) -> None:
    array = np.asarray(
        np.random.default_rng(0).integers(0, 256, (3, 5), dtype=np.uint8), order=order
    )
    loaded = load_plain(pickle.dumps({"a": array, "b": [1, 2], b"c": b"\xff"}, protocol=2))
    assert np.array_equal(loaded["a"], array) and loaded["b"] == [1, 2]
    for other in (array.astype(np.float32), array.astype(object)):
        with pytest.raises(ValueError, match="only bytes are allowed"):
            load_plain(pickle.dumps({"a": other}, protocol=2))
    for junk in (b"", b"text", pickle.dumps(3), pickle.dumps({"a": array}, protocol=2)[:-9]):
        with pytest.raises(ValueError, match="no pickle of arrays and lists"):
            load_plain(junk)
