"""Every kernel compiles for GPUs that this machine does not have; a sample of what aot.py does."""

import pytest

from isofast_kernels import aot

SAMPLE = [
    "asymmetric_loss cosine fp32 D=256",
    "asymmetric_loss iso cosine bf16 D=256",
    "asymmetric_loss cosine fp32 D=528",
    "asymmetric_loss iso euclidean fp16 D=1024",
    "correlation ema bf16 D=256",
    "correlation fp32 D=32",
    "correlation ema fp16 D=37 one view",
    "square quotient D=256",
    "shift spectral bounded D=256",
    "polynomial D=256",
    "product D=1024",
    "finish D=256",
    "augment 64 to 64 bf16",
    "augment 96 to 96 blur fp32",
    "augment 256 to 224 fp16",
]


def build_named(name):
    (build,) = (build for build in aot.builds() if build.name == name)
    return build


@pytest.mark.parametrize("name", SAMPLE)
def test_no_spills_on_sm_90(name):
    usage = aot.measure(build_named(name), 90)
    assert usage.spills == 0
    assert 0 < usage.shared <= aot.SHARED_LIMIT[90] or name.startswith("shift")
    assert 16 <= usage.registers <= 255
    assert usage.within_budget


@pytest.mark.parametrize("views", ["", " one view"])
@pytest.mark.parametrize("capability", [80, 100])
def test_other_targets(capability, views):
    usage = aot.measure(build_named("correlation ema bf16 D=256" + views), capability)
    assert usage.target == capability and usage.within_budget


def test_a_spill_is_seen():
    """Half the registers a thread for twice the inner step does not fit; the measure says so."""
    build = build_named("asymmetric_loss cosine fp16 D=1024")
    greedy = {**build.constants, "BLOCK_K": 16}
    usage = aot.measure(aot.Build(build.name, build.types, greedy, num_warps=16, num_stages=2), 90)
    assert usage.spills > 0 and not usage.within_budget


def test_the_table_and_its_exit_code(capsys):
    assert aot.main(["--targets", "sm_90", "--only", "finish D=32", "--jobs", "1"]) == 0
    assert "finish D=32" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--targets", "sm_42"])
    assert stopped.value.code == 2
    assert "sm_42" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--jobs", "0"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("over", ["shared memory", "a spill"])
def test_what_is_over_budget_exits_with_1(over, capsys, monkeypatch):
    name = "correlation fp32 D=32"
    if over == "shared memory":
        monkeypatch.setitem(aot.SHARED_LIMIT, 90, 0)
    else:
        spilled = aot.Usage(name, 90, registers=255, spills=3, stack=16, shared=0)
        monkeypatch.setattr(aot, "measure", lambda build, capability: spilled)
    assert aot.main(["--targets", "sm_90", "--only", name, "--jobs", "1"]) == 1
    printed = capsys.readouterr().out
    *_, summary, again = printed.splitlines()
    assert "1 over budget" in summary and again.endswith("OVER") and name in again
    assert printed.count(again) == 2


def test_every_kernel_dtype_and_tile_is_listed():
    names = [build.name for build in aot.builds()]
    assert len(set(names)) == len(names)
    for kernel in aot.KERNELS:
        assert any(name.split()[0] == kernel for name in names)
    for features in aot.FEATURES:
        for dtype in aot.DTYPES:
            assert f"asymmetric_loss iso cosine {dtype} D={features}" in names
            assert f"correlation ema {dtype} D={features}" in names
        for features in (256, 1024, *aot.RAGGED):
            assert f"correlation ema {dtype} D={features} one view" in names
    for dtype in aot.DTYPES:
        assert f"augment 96 to 96 blur {dtype}" in names
