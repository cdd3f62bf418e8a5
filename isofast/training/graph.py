"""A training step as one CUDA graph: one launch per step instead of several hundred."""

from collections.abc import Callable

import torch

from isofast.data import Batch
from isofast.errors import RunError
from isofast.training.step import StepOutput

WARMUP_STEPS = 20
"""Eager steps before capture, in which kernels compile and cuDNN picks its algorithms."""


class GraphedStep:
    """``step`` as a CUDA graph, captured at call ``warmup + 1`` and replayed from then on.

    Each call copies the batch into static tensors that the graph reads. Anything else that changes
    between steps, such as the learning rate and the EMA decay, must be a tensor on the device.
    Warm-up calls are ordinary eager training steps, and so is every call on a CPU.

    Args:
        step: the training step; each call overwrites the previous results.
        device: device of the batches.
        warmup: calls before the capture.

    Raises:
        RunError: the step cannot be captured.
    """

    def __init__(
        self,
        step: Callable[[Batch], StepOutput],
        device: torch.device,
        warmup: int = WARMUP_STEPS,
    ) -> None:
        self._step = step
        self._left = warmup if device.type == "cuda" else None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._batch: Batch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: StepOutput | None = None

    def __call__(self, batch: Batch) -> StepOutput:
        if self._batch is None:
            self._batch = Batch(*(torch.empty_like(x) for x in batch))
        for static, x in zip(self._batch, batch, strict=True):
            static.copy_(x)
        if self._stream is None:
            return self._step(self._batch)
        if self._graph is None and self._left:
            self._left -= 1
            return self._warm_up(self._batch)
        if self._graph is None:
            self._capture(self._batch)
        assert self._graph is not None and self._output is not None
        self._graph.replay()
        return self._output

    def _warm_up(self, batch: Batch) -> StepOutput:
        """Run a step on the capture stream, so that nothing is tied to another stream."""
        current = torch.cuda.current_stream()
        assert self._stream is not None
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._step(batch)
        current.wait_stream(self._stream)
        return output

    def _capture(self, batch: Batch) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # the loader and recorder threads keep calling CUDA during capture
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._output = self._step(batch)
        except RuntimeError as error:
            raise RunError(
                f"the step could not be captured as a CUDA graph ({error}); "
                f"to train without one, --set train.cuda_graph=off"
            ) from error
        self._graph = graph
