"""Machine faults, explained in the user's terms."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from isofast.config.schema import Config
from isofast.errors import GOES_ON, RunError, UserError

# CUDA's and Triton's words, cuBLAS's, cuDNN's, DALI's
_GPU_FULL = (
    *("CUDA error: out of memory", "[CUDA]: out of memory", "STATUS_ALLOC_FAILED"),
    "DEVICE_ALLOCATION_FAILED",
    *("CUDA allocation failed", "bytes on device"),
)


@contextmanager
def in_words(config: Config) -> Iterator[None]:
    """Turn errors from a lost peer or exhausted memory into a RunError."""
    try:
        yield
    except (RunError, UserError):
        raise
    except Exception as error:
        if (message := _message(error, config)) is None:
            raise
        raise RunError(message) from error


def _message(error: Exception, config: Config) -> str | None:
    """Return what happened and what to do, or None for any other error."""
    cause = str(error)
    sentences = cause.split(". ")
    # torch's, DALI's and Triton's errors
    plain = isinstance(error, RuntimeError)
    if "NCCL error" in cause and "remote process" not in cause:
        why = cause.rpartition("Last error:")[2].strip() or cause
        return f"NCCL failed: {why}. NCCL_DEBUG=WARN says more; then {GOES_ON}"
    if "connectFullMesh" in cause:
        return (
            f"gloo cannot connect the processes ({sentences[0]}). One of them may be gone; else "
            f"export GLOO_SOCKET_IFNAME=the network device that reaches MASTER_ADDR on each "
            f"machine, then {GOES_ON}"
        )
    if isinstance(error, torch.distributed.DistError) or (plain and "gloo" in cause):
        return (
            f"another process of the run is gone, or never connected; its own message or the "
            f"launcher's says why. Then {GOES_ON} ({sentences[0]})"
        )
    full = isinstance(error, RuntimeError | MemoryError) and any(s in cause for s in _GPU_FULL)
    if isinstance(error, torch.OutOfMemoryError) or full:
        return (
            f"the GPU is out of memory ({'. '.join(sentences[:2])}). Lower "
            f"evaluation.batch_size or start more processes, which split the batch, then "
            f"{GOES_ON}. Or start over (--fresh) with train.accumulation="
            f"{2 * config.train.accumulation}, a smaller train.batch_size (now "
            f"{config.train.batch_size}), or data.backend=dali if the images are resident"
        )
    exhausted = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    # DefaultCPUAllocator, std::bad_alloc
    if exhausted or (plain and "alloc" in cause):
        return (
            f"this machine is out of memory ({cause or 'MemoryError'}). Free some, or lower "
            f"data.prefetch (now {config.data.prefetch}), data.threads, "
            f"evaluation.batch_size or evaluation.knn_images, then {GOES_ON}"
        )
    return None
