"""Compile every kernel for given GPUs on a machine without one, and check its resource usage.

    python -m isofast_kernels.aot [--targets sm_80,sm_90,sm_100] [--only TEXT] [--all-widths]
        [--jobs N]

prints one row per kernel and target: registers per thread, spill instructions (LDL and STL in the
machine code), stack and shared memory. Exits with 1 if a kernel spills, uses a stack or needs more
shared memory than its target gives a block. Kernels are compiled as in a launch: with its tile
sizes, pointers aligned to 16 bytes, fixed sizes and B unknown.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import ops  # noqa: F401  (imports the kernel modules in their order)
from .asymmetric_loss import _loss_kernel, _rows_times_w_kernel, product_tiles, row_tiles
from .augment import _augment_kernel, taps
from .augment import tile_options as augment_tiles
from .correlation import _correlation_kernel
from .correlation import tile_options as correlation_tiles
from .dispatch import INTERPRET
from .matrix_power import BOUND_SQUARINGS, SQUARINGS
from .matrix_power_triton import (
    _finish_kernel,
    _normalize_kernel,
    _product_kernel,
    _shift_kernel,
)
from .matrix_power_triton import tile_options as power_tiles
from .norm_pool import FORWARD_TILE, SUMMED_TILES, _norm_pool_gradient_kernel, _norm_pool_kernel
from .norm_pool import tile_options as pool_tiles

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

DTYPES = ("fp32", "fp16", "bf16")

VIEWS = ((32, 32, False), (64, 64, False), (96, 96, True), (96, 64, True), (256, 224, False))
"""Sides of stored images and views, and whether there is blur: the presets and downscaling."""

STEMS = ((64, 64), (64, 48), (64, 112), (48, 23))
"""Channels and side of the pooled map: presets, ImageNet, and one that no tile divides."""


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel, as a launch would compile it."""

    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True


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


KERNELS = {
    "rows_times_w": _rows_times_w_kernel,
    "asymmetric_loss": _loss_kernel,
    "correlation": _correlation_kernel,
    "augment": _augment_kernel,
    "normalize": _normalize_kernel,
    "shift": _shift_kernel,
    "product": _product_kernel,
    "polynomial": _product_kernel,
    "finish": _finish_kernel,
    "norm_pool": _norm_pool_kernel,
    "norm_pool_sums": _norm_pool_gradient_kernel,
    "norm_pool_gradient": _norm_pool_gradient_kernel,
}


def _build(name: str, types: dict[str, str], constants: dict[str, Any]) -> Build:
    num_warps = constants.pop("num_warps")
    num_stages = constants.pop("num_stages", 1)
    return Build(name, types, constants, num_warps, num_stages)


def builds(all_widths: bool = False) -> Iterator[Build]:
    """Yield every kernel with every dtype, tile and flag; `all_widths` adds WIDTHS and RAGGED."""
    widths = WIDTHS if all_widths else FEATURES
    for dtype in DTYPES:
        for features in (*LOSS_FEATURES, *RAGGED) if all_widths else LOSS_FEATURES:
            yield from _loss_builds(features, dtype)
        for features in widths:
            for views in (1, 2):
                yield from _correlation_builds(features, dtype, views)
        for stored, side, blur in VIEWS:
            yield _augment_build(stored, side, blur, dtype)
        for channels, side in STEMS:
            yield from _pool_builds(channels, side, dtype)
    for features in POWER_WIDTHS:
        if all_widths or features in FEATURES:
            yield from _power_builds(features)


def _loss_builds(features: int, dtype: str) -> Iterator[Build]:
    yield _build(
        f"rows_times_w {dtype} D={features}",
        dict.fromkeys(("x1_ptr", "x2_ptr"), f"*{dtype}")
        | {"w_ptr": "*fp32", "out_ptr": "*fp32", "count_ptr": "*i32", "B": "i32"},
        {"D": features, **product_tiles(features)},
    )
    for metric in ("cosine", "euclidean"):
        for isotropic in (True, False):
            rows = dict.fromkeys(("z1_ptr", "z2_ptr", "target1_ptr", "target2_ptr"), f"*{dtype}")
            rest = dict.fromkeys(("p_ptr", "loss_ptr", "sum_ptr", "g_ptr"), "*fp32")
            rest["count_ptr"] = "*i32"
            flags = {"EUCLIDEAN": metric == "euclidean", "ISOTROPIC": isotropic}
            yield _build(
                f"asymmetric_loss {'iso ' if isotropic else ''}{metric} {dtype} D={features}",
                {**rows, **rest, "scale": "fp32", "B": "i32"},
                {"D": features, **flags, **row_tiles(features)},
            )


def _correlation_builds(features: int, dtype: str, views: int) -> Iterator[Build]:
    types = {"corr_ptr": "*fp32", "z1_ptr": f"*{dtype}", "z2_ptr": f"*{dtype}"}
    tiles = correlation_tiles(features, 4 if dtype == "fp32" else 2)
    scalars = {"decay": "fp32", "scale": "fp32", "B1": "i32", "B2": "i32"}
    for ema in (True, False):
        yield _build(
            f"correlation {'ema ' if ema else ''}{dtype} D={features}"
            + (" one view" if views == 1 else ""),
            {**types, **scalars},
            {"D": features, "EMA": ema, "VIEWS": views, **tiles},
        )


def _power_builds(features: int) -> Iterator[Build]:
    options = power_tiles(features)
    blocks = {name: options[name] for name in ("BLOCK_I", "BLOCK_J")}
    tiles = features**2 // (options["BLOCK_I"] * options["BLOCK_J"])
    shape = {"D": features, **options}
    sums = {"TILES": tiles, "BLOCK_T": triton.next_power_of_2(tiles)}
    side = {"BLOCK_D": triton.next_power_of_2(features)}

    def pointers(kind: str, *names: str) -> dict[str, str]:
        return dict.fromkeys((f"{name}_ptr" for name in names), f"*{kind}")

    # a bound, the largest eigenvalue, or both, from this many squares
    for spectral, bounded, squares in (
        (False, True, BOUND_SQUARINGS),
        (True, False, SQUARINGS),
        (True, True, SQUARINGS),
    ):
        words = " spectral" * spectral + " bounded" * bounded
        own = {"SQUARES": squares, "BLOCK_S": triton.next_power_of_2(squares + 1)}
        flags = {"SPECTRAL": spectral, "BOUNDED": bounded}
        types = pointers("fp32", "corr", "trace", "sums", "r") | {"eps": "fp32"}
        yield _build(
            f"shift{words} D={features}",
            types | pointers("fp16" if bounded else "fp32", "out"),
            {"D": features, **flags, **sums, **own, **blocks, "num_warps": 4},
        )
    yield _build(
        f"normalize D={features}",
        pointers("fp32", "corr", "trace") | pointers("fp16", "out"),
        {"D": features, **side, **blocks, "num_warps": 4},
    )
    types = pointers("fp16", "x1", "y1", "x2", "y2", "out", "m", "n")
    types |= pointers("fp32", "corr", "trace", "sums")
    types |= dict.fromkeys("abc", "fp32") | {"products": "i32", "index": "i32"}
    for name in (
        *("product", "product and square", "product and quotient"),
        *("polynomial", "polynomial and square"),
    ):
        flags = {word.upper(): word in name for word in ("polynomial", "quotient")}
        flags["SQUARE"] = " and " in name
        yield _build(f"{name} D={features}", types, {**shape, **side, **flags})
    for scaled in (False, True):
        yield _build(
            f"finish{' scaled' if scaled else ''} D={features}",
            pointers("fp16", "x", "y") | pointers("fp32", "r", "sums", "out") | {"power": "fp32"},
            {**shape, **sums, "SCALED": scaled},
        )


def _augment_build(stored: int, side: int, blur: bool, dtype: str) -> Build:
    pointers = {"images": "u8", "index": "i64", "parameters": "fp32", "levels": "u8"}
    pointers |= {"blurred": "fp32", "out": dtype}
    scalars = [f"{kind}_{channel}" for kind in ("mean", "inv") for channel in "rgb"]
    reach = taps(stored, side)
    constants = {"H": stored, "W": stored, "S": side, "TAPS_Y": reach, "TAPS_X": reach}
    build = _build(
        f"augment {stored} to {side}{' blur' if blur else ''} {dtype}",
        {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
        | dict.fromkeys(scalars, "fp32"),
        {**constants, "BLUR": blur, **augment_tiles(side)},
    )
    return replace(build, fp_fusion=False)


def _pool_builds(channels: int, side: int, dtype: str) -> Iterator[Build]:
    words = f"{dtype} {channels}x{side}x{side}"
    images = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr"), f"*{dtype}") | {"taps_ptr": "*u8"}
    of = dict.fromkeys(("mean_ptr", "slope_ptr", "bias_ptr", "shift_ptr", "along_ptr"), "*fp32")
    types = images | of | {"images": "i32"}
    shape = {"C": channels, "H": side, "W": side, **pool_tiles(channels)}
    yield _build(f"norm_pool {words}", types, shape | pool_tiles(channels, FORWARD_TILE))
    for name, out, steps in (("sums", "*fp32", SUMMED_TILES), ("gradient", f"*{dtype}", 1)):
        flags = {"SUMS": name == "sums", "STEPS": steps}
        yield _build(f"norm_pool_{name} {words}", types | {"out_ptr": out}, shape | flags)


def compile_for(build: Build, capability: int) -> Any:
    """Compile `build` for a compute capability (80, 90, 100); return Triton's compiled kernel."""
    kernel = KERNELS[build.name.split()[0]]
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
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": build.num_warps,
            "num_stages": build.num_stages,
            "enable_fp_fusion": build.fp_fusion,
        },
    )


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


def _measure(pair: tuple[Build, int]) -> Usage:
    return measure(*pair)


def _measure_all(pairs: list[tuple[Build, int]], jobs: int) -> Iterator[Usage]:
    if jobs == 1:
        yield from map(_measure, pairs)
        return
    # spawn, because forking a process that has run torch's threads may hang
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_measure, pairs, chunksize=4)


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
