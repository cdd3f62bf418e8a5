"""Compile every kernel for given GPUs on a machine without one, and check its resource usage.

    python -m isofast_kernels.aot [--targets sm_80,sm_90,sm_100] [--only TEXT] [--all-widths]
        [--jobs N]

prints one row per kernel and target: registers per thread, spill instructions (LDL and STL in the
machine code), stack and shared memory. Exits with 1 if a kernel spills, uses a stack or needs more
shared memory than its target gives a block. Kernels are compiled as in a launch: with its tile
sizes, pointers aligned to 16 bytes, fixed sizes and B unknown.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product, starmap
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from .asymmetric_loss import asymmetric_loss_launch
from .augment import augment_launch
from .augment_reference import COLUMNS
from .correlation import correlation_launch
from .dispatch import INTERPRET
from .matrix_power_triton import matrix_power_launch
from .norm_pool import norm_pool_gradient_launch, norm_pool_launch, norm_pool_sums_launch
from .reference import METRICS

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Maximum bytes of shared memory per block, by compute capability."""

FEATURES = (32, 64, 128, 256, 512, 1024)
"""One D for every tile that a launch may choose."""

LOSS_FEATURES = (*FEATURES, 2048)
"""The same for the losses."""

RAGGED = (37, 250, 528)
"""Some D for the losses that no tile divides."""

WIDTHS = (*range(32, 512, 32), *range(512, 1025, 64))
"""Every D up to 1024 for the correlation; a launch pads other widths to the next."""

POWER_WIDTHS = tuple(range(64, 1025, 64))
"""The same for the matrix power."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TYPES = {dtype: name for name, dtype in DTYPES.items()} | {
    **{torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"},
    **{int: "i32", float: "fp32"},
}

VIEWS = ((32, 32, False), (64, 64, False), (96, 96, True), (96, 64, True), (256, 224, False))
"""Sides of stored images and views, and whether there is blur: the presets and downscaling."""

STEMS = ((64, 64), (64, 48), (64, 112), (48, 23))
"""Channels and side of the pooled map: presets, ImageNet, and one that no tile divides."""


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel, as a launch would compile it."""

    name: str
    kernel: tuple[str, str]
    """Module and function."""
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Resources that ptxas assigned to a build."""

    name: str
    target: int
    registers: int
    spills: int
    stack: int
    shared: int

    @property
    def within_budget(self) -> bool:
        return self.spills == self.stack == 0 and self.shared <= SHARED_LIMIT[self.target]


def builds(all_widths: bool = False) -> list[Build]:
    """Return what is compiled for every dtype, tile and flag; `all_widths` adds WIDTHS, RAGGED."""
    found: dict[str, Build] = {}
    launched: list[tuple[Any, Any, Any]] = []

    def record(kernel: Any, *args: Any, **given: Any) -> None:
        launched.append((kernel, args, given))

    with mock.patch.object(JITFunction, "run", record), torch.device("meta"):
        for label in _launches(all_widths):
            for kernel, args, given in launched:
                build = _build(label, kernel, args, given)
                found.setdefault(repr(replace(build, name="")), build)
            launched.clear()
    return [*found.values()]


def _build(label: str, kernel: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Build:
    given = given | dict(zip(kernel.arg_names, args, strict=False))
    options = {k: v for k, v in given.items() if k not in (*kernel.arg_names, "grid", "warmup")}
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    types = {name: _type(given[name]) for name in kernel.arg_names if name not in constants}
    kind = kernel.__name__.removeprefix("_").removesuffix("_kernel")
    flags = [name.lower() for name, value in constants.items() if value is True]
    place = kernel.__module__, kernel.__name__
    return Build(" ".join([kind, *flags, label]), place, types, constants, options)


def _type(x: Any) -> str:
    return f"*{_TYPES[x.dtype]}" if isinstance(x, torch.Tensor) else _TYPES[type(x)]


def _launches(all_widths: bool) -> Iterator[str]:
    """Launch every kernel, on any numbers of rows and images; yield a label after each few."""
    empty = torch.empty
    for name, dtype in DTYPES.items():
        for d in (*LOSS_FEATURES, *RAGGED) if all_widths else LOSS_FEATURES:
            both = [empty(8, d, dtype=dtype)] * 2
            for metric, isotropic in product(METRICS, (True, False)):
                asymmetric_loss_launch(both, both, empty(d, d), metric, isotropic)
            yield f"{name} D={d}"
        for d, views in product(WIDTHS if all_widths else FEATURES, (2, 1)):
            for decay in (0.5, None):
                correlation_launch(empty(d, d), [empty(8, d, dtype=dtype)] * views, decay)
            yield f"{name} D={d}{' one view' if views == 1 else ''}"
        for stored, side, blur in VIEWS:
            images = empty(8, stored, stored, 3, dtype=torch.uint8)
            batch = images, empty(8, dtype=torch.int64), empty(2, 8, len(COLUMNS))
            augment_launch(*batch, side, [0.5] * 3, [0.5] * 3, blur, dtype)
            yield f"{name} {stored} to {side}"
        for channels, side in STEMS:
            x, of = empty(8, channels, side, side, dtype=dtype), empty(2, channels)
            y, taps = norm_pool_launch(x, of, of, of[0])
            norm_pool_sums_launch(y, taps, x, of)
            norm_pool_gradient_launch(y, taps, x, of, of, of, of)
            yield f"{name} {channels}x{side}x{side}"
    for d in POWER_WIDTHS:
        if all_widths or d in FEATURES:
            matrix_power_launch(empty(d, d), 1.0, 0.0, "spectral")
            for normalize, eps in (("none", 0.0), ("spectral", 0.0), ("spectral", 0.25)):
                matrix_power_launch(empty(d, d), 0.5, eps, normalize)
            yield f"D={d}"


def compile_for(build: Build, capability: int) -> Any:
    """Compile `build` for a compute capability (80, 90, 100); return Triton's compiled kernel."""
    module, name = build.kernel
    kernel = getattr(importlib.import_module(module), name)
    constants = dict.fromkeys(build.constants, "constexpr")
    # ASTSource matches by position
    signature = {name: (build.types | constants)[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(k),): v for k, v in build.constants.items()},
        attrs=aligned,
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=build.options)


def measure(build: Build, capability: int) -> Usage:
    """Compile `build` and measure the resources of its machine code."""
    compiled = compile_for(build, capability)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(compiled.asm["cubin"])
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", path)
        # one function per cubin; its "SHARED" counts static memory only, metadata has the total
        registers, stack, local = (
            int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL")
        )
        # spills live on the stack; disassembling takes as long as compiling
        code = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", path) if stack or local else ""
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Usage(build.name, capability, registers, spills, stack, compiled.metadata.shared)


def _tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _measure_all(pairs: list[tuple[Build, int]], jobs: int) -> Iterator[Usage]:
    if jobs == 1:
        yield from starmap(measure, pairs)
        return
    # spawn, because forking a process that has run torch's threads may hang
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure, *zip(*pairs, strict=True), chunksize=4)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if anything is over budget, exit with 2 on bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m isofast_kernels.aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100", help="comma-separated")
    parser.add_argument("--only", default="", help="compile only kernels whose name has this text")
    parser.add_argument(
        "--all-widths",
        action="store_true",
        help="add D that are not powers of two: all for some kernels, a sample for the losses",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    options = parser.parse_args(arguments)
    if INTERPRET:
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    known = {f"sm_{capability}": capability for capability in SHARED_LIMIT}
    targets = [target.strip() for target in options.targets.split(",")]
    unknown = sorted(set(targets) - set(known))
    if unknown:
        parser.error(f"unknown target {', '.join(unknown)}; choose from {', '.join(known)}")
    pairs = [
        (build, known[target])
        for target in targets
        for build in builds(options.all_widths)
        if options.only in build.name
    ]
    if not pairs:
        parser.error(f"no kernel name contains {options.only!r}")
    print(f"{'kernel':44} {'target':6} {'registers':>9} {'spills':>6} {'stack':>5} {'shared':>7}")
    over = []
    for usage in _measure_all(pairs, options.jobs):
        row = (
            f"{usage.name:44} sm_{usage.target:<3} {usage.registers:9} {usage.spills:6} "
            f"{usage.stack:5} {usage.shared:7}"
        )
        if not usage.within_budget:
            row += "  OVER"
            over.append(row)
        print(row, flush=True)
    print(f"{len(pairs)} kernels compiled, {len(over)} over budget")
    # repeat at the end, where people look
    print(*over, sep="\n", end="\n" if over else "")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
