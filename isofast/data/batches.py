"""What the loaders yield, and what the renderers make it from."""

from typing import NamedTuple

import torch

from isofast.data.draw import Ints, ViewDraw


class Batch(NamedTuple):
    """Two augmented views of the same images, on the device.

    x1_BCHW, x2_BCHW: normalised, channels_last in memory, in the loader's dtype.
    y_B: int64 labels.
    """

    x1_BCHW: torch.Tensor
    x2_BCHW: torch.Tensor
    y_B: torch.Tensor


class Chunk(NamedTuple):
    """T consecutive batches of B images, and the parameters of both views of N = T * B images."""

    index_TB: Ints
    view1: ViewDraw
    view2: ViewDraw
