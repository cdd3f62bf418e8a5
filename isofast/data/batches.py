"""What the loaders yield, and what the renderers make it from."""

from typing import NamedTuple

import torch

from isofast.data.draw import Ints, ViewDraw


class Batch(NamedTuple):
    """Two augmented views of B images, on the device.

    x_NCHW: the first views, then the second ones (N = 2B): normalised, contiguous as
        channels_last, in the loader's dtype.
    y_B: int64 labels.
    """

    x_NCHW: torch.Tensor
    y_B: torch.Tensor

    @property
    def x1_BCHW(self) -> torch.Tensor:
        """The first views."""
        return self.x_NCHW.chunk(2)[0]

    @property
    def x2_BCHW(self) -> torch.Tensor:
        """The second views."""
        return self.x_NCHW.chunk(2)[1]


class Chunk(NamedTuple):
    """T consecutive batches of B images, and the parameters of both views of N = T * B images."""

    index_TB: Ints
    view1: ViewDraw
    view2: ViewDraw
