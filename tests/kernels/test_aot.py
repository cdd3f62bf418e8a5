"""Kernels compile for GPUs that this machine does not have; a sample of what aot.py compiles."""

import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from isofast_kernels import aot, correlation, matrix_power_triton
from isofast_kernels.asymmetric_loss import product_tiles, row_tiles

from ..support.runs import call

SAMPLE = [
    "rows_times_w bf16 D=256",
    "rows_times_w fp32 D=528",
    "loss isotropic bf16 D=256",
    "loss fp32 D=528",
    "loss euclidean isotropic fp16 D=1024",
    "correlation ema bf16 D=256",
    "correlation fp32 D=32",
    "correlation ema fp16 D=96 one view",
    "shift spectral bounded D=256",
    "product polynomial square D=256",
    "product square quotient D=256",
    "product D=1024",
    "finish scaled D=256",
    "augment bf16 64 to 64",
    "augment blur fp32 96 to 96",
    "augment fp16 256 to 224",
    "norm_pool bf16 64x64x64",
    "norm_pool_gradient sums bf16 64x64x64",
    "norm_pool_gradient fp32 48x23x23",
]


def build_named(name):
    (build,) = (build for build in aot.builds(all_widths=True) if build.name == name)
    return build


OTHERS = [f"correlation ema bf16 D=256{views}" for views in ("", " one view")]


@pytest.mark.parametrize(
    ("name", "capability"), [*product(SAMPLE, [90]), *product(OTHERS, [80, 100])]
)
def test_a_kernel_is_within_its_budget(name, capability):
    usage = aot.measure(build_named(name), capability)
    assert usage.target == capability and usage.within_budget
    assert usage.spills == 0
    assert usage.shared > 0 or name.startswith(("shift", "norm_pool "))
    assert usage.shared <= aot.SHARED_LIMIT[capability]
    assert 16 <= usage.registers <= 255


@pytest.mark.parametrize(
    ("name", "tf32"),
    [
        *((f"rows_times_w {of}", True) for of in ("fp32 D=256", "fp16 D=256", "fp32 D=512")),
        *(("correlation ema fp32 D=256", True), ("rows_times_w fp32 D=32", False)),
    ],
)
def test_products_are_three_tf32_and_of_few_features_fp32(name, tf32):
    """The interpreter would not reveal a single TF32 product."""
    code = aot.compile_for(build_named(name), 90).asm["ttir"]
    products = [line for line in code.splitlines() if "tt.dot" in line]
    assert products and all(("inputPrecision = tf32x3" in line) is tf32 for line in products)
    assert tf32 or "tf32" not in code


@pytest.mark.parametrize("features", [256, 1024])
def test_bf16_rows_meet_w_in_three_parts(features):
    build = build_named(f"rows_times_w bf16 D={features}")
    code = aot.compile_for(build, 90).asm["ttir"]
    # for each of the two directions; the last uses the part that is truncated first
    assert len(re.findall(r"tt\.dot .*xbf16> \* tensor<\w+xbf16>", code)) == code.count("tt.dot ")
    factors = re.findall(r"tt\.dot %\S+, (%\w+)", code)
    parts = re.findall(r"(%\w+) = arith\.truncf", code)
    assert len(factors) == len(parts) == 2 * 3
    assert [factors[2], factors[5]] == [parts[0], parts[3]]


@pytest.mark.parametrize("name", ["rows_times_w bf16", "loss isotropic bf16"])
def test_rows_of_the_losses_are_found_in_64_bits(name):
    code = aot.compile_for(build_named(f"{name} D=256"), 90).asm["ttir"]
    # B * D may exceed 2^31: the first row of either direction, and the second direction's
    assert len(re.findall(r"arith\.extsi .* i32 to i64", code)) >= 3


@pytest.mark.parametrize("name", ["norm_pool", "norm_pool_gradient sums", "norm_pool_gradient"])
def test_images_of_the_stem_are_found_in_64_bits(name):
    code = aot.compile_for(build_named(f"{name} bf16 64x64x64"), 90).asm["ttir"]
    assert len(re.findall(r"arith\.muli .* : i64", code)) >= 2


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name",
    [
        "correlation ema bf16 D=256",
        "rows_times_w bf16 D=256",
        "rows_times_w fp32 D=512",
        "product D=256",
        "product D=512",
    ],
)
def test_no_warp_computes_what_another_does(name, capability):
    """Triton lays warps along one side of a tile whose products share factors, even too many."""
    code = aot.compile_for(build_named(name), capability).asm["ttgir"]
    layouts = re.findall(r"(#\w+) = #ttg.nvidia_mma<.*warpsPerCTA = \[(\d+), (\d+)\]", code)
    warps = {layout: (int(down), int(across)) for layout, down, across in layouts}
    products = re.findall(r"_?dot %.* -> tensor<(\d+)x(\d+)xf32, (#\w+)>", code)
    assert products
    for rows, columns, layout in products:
        down, across = warps[layout]
        # one warp's product is at least 16 x 8
        assert 16 * down <= int(rows) and 8 * across <= int(columns)


@pytest.mark.parametrize(
    ("name", "products", "from_zero"),
    [
        # one per view
        ("correlation ema bf16 D=256", 2, 2),
        ("correlation fp16 D=1024", 2, 2),
        # in either direction the lowest part begins and the others add to it
        ("rows_times_w bf16 D=256", 6, 2),
        # in either product the high halves'; those with a low half count 2^11 times less
        ("product D=256", 6, 2),
        ("product D=1024", 6, 2),
    ],
)
@pytest.mark.parametrize("capability", [80, 90])
def test_sums_of_the_tensor_cores_begin_at_zero(name, products, from_zero, capability):
    """Chained over 2,048 rows they would be off by 9e-6, which the interpreter does not show."""
    code = aot.compile_for(build_named(name), capability).asm["ttgir"]
    sums = re.findall(r"(?:tt\.dot|warp_group_dot) %\S+, %\S+, (%\w+)", code)
    assert len(sums) == products
    zeros = [x for x in sums if re.search(rf"{x} = arith\.constant dense<0\.0", code)]
    assert len(zeros) == from_zero


def test_the_last_program_sees_every_loss():
    """The interpreter runs programs one by one, in order, and would work without any of these."""
    build = build_named("loss isotropic bf16 D=256")
    code = aot.compile_for(build, 90).asm["ttir"]
    # a block barrier, then the counter, then losses read from where all stores are visible
    counted = (
        r"(?:gpu|ttg)\.barrier.*\n.*(%\w+) = tt\.atomic_rmw add, acq_rel, gpu(?s:.*)"
        r"arith\.cmpi eq, \1,(?s:.*)cache_?[mM]odifier = cg"
    )
    assert len(re.findall(counted, code)) == 1


def test_a_spill_is_seen():
    """Two warps for a tile that needs eight; ``measure`` reports it."""
    build = build_named("rows_times_w fp32 D=1024")
    greedy = {**build.constants, "BLOCK_B": 64, "BLOCK_D": 128}
    options = {"num_warps": 2, "num_stages": 2}
    usage = aot.measure(replace(build, constants=greedy, options=options), 90)
    assert usage.spills > 0 and not usage.within_budget


def test_the_table_and_its_exit_code(capsys):
    assert aot.main(["--targets", "sm_90, sm_80", "--only", "finish D=64", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("finish D=64", "sm_90", "sm_80", "2 kernels"))


@pytest.mark.parametrize(("option", "value"), [("--targets", "sm_42"), ("--jobs", "0")])
def test_arguments_that_cannot_be_exit_with_2(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        aot.main([option, value])
    assert stopped.value.code == 2
    assert value in capsys.readouterr().err


@pytest.mark.slow
def test_the_interpreter_leaves_nothing_to_compile():
    command = [sys.executable, "-m", "isofast_kernels.aot"]
    assert "TRITON_INTERPRET" in call(command, code=2, TRITON_INTERPRET="1").stderr


def test_what_is_over_budget_exits_with_1(capsys, monkeypatch):
    name = "product polynomial D=128"
    monkeypatch.setitem(aot.SHARED_LIMIT, 90, 0)
    assert aot.main(["--targets", "sm_90", "--only", name, "--jobs", "1"]) == 1
    printed = capsys.readouterr().out
    *_, summary, again = printed.splitlines()
    assert "1 over budget" in summary and again.endswith("OVER") and name in again
    assert printed.count(again) == 2


@pytest.mark.parametrize("all_widths", [False, True])
def test_every_kernel_dtype_and_tile_is_listed(all_widths):
    names = [build.name for build in aot.builds(all_widths)]
    assert len(set(names)) == len(names)
    dtypes, widths = len(aot.DTYPES), set(aot.WIDTHS if all_widths else aot.FEATURES)
    losses = dtypes * len(aot.LOSS_FEATURES + aot.RAGGED * all_widths)
    powers, pools = len(widths & set(aot.POWER_WIDTHS)), dtypes * len(aot.STEMS)
    # the correlation with and without EMA, for one view and several
    assert Counter(name.split()[0] for name in names) == {
        **{"rows_times_w": losses, "loss": 4 * losses},
        **{"correlation": 4 * dtypes * len(widths), "augment": dtypes * len(aot.VIEWS)},
        **{"normalize": powers, "shift": 3 * powers, "finish": 2 * powers},
        # a product or a polynomial, plain or with a square; a product also with the quotient
        **{"product": 5 * powers, "norm_pool": pools, "norm_pool_gradient": 2 * pools},
    }


def test_what_is_launched_is_among_what_is_compiled():
    assert set(aot.FEATURES) < set(aot.WIDTHS)
    for module, known in (
        (correlation, aot.WIDTHS),
        (matrix_power_triton, aot.POWER_WIDTHS),
    ):
        widths = [module.padded(features) for features in range(1, 1025)]
        assert set(widths) == set(known)
        assert all(0 <= width - d < 64 for d, width in enumerate(widths, 1))
    # a loss tile serves every narrower D; widths in between are masked
    for tiles in (product_tiles, row_tiles):
        known = [tiles(features) for features in aot.LOSS_FEATURES]
        assert all(tiles(features) in known for features in range(1, 2049))


@pytest.mark.parametrize("over", [{"stack": 8}, {"spills": 1}, {"shared": 232_449}], ids=str)
def test_the_budget_is_the_hardware_s(over):
    """CUDA's programming guide: 227 KiB of shared memory per block on sm_90."""
    usage = aot.Usage("x", 90, registers=255, spills=0, stack=0, shared=232_448)
    assert usage.within_budget and not replace(usage, **over).within_budget
