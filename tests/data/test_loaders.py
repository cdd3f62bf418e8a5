"""The loaders' guarantees: sampling by rank and epoch, resume, layout, memory, failures."""

import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from isofast.data import Batch, TrainLoader, open_dataset, recipe_for
from isofast.data.resident import clean_image
from isofast.errors import RunError, UserError

from ..support.runs import assert_equal_trees, call, environment, forked
from .conftest import checked, eval_loader, levels_of, numbered, take

BOTH = pytest.mark.parametrize("backend", ["dali", "resident"])


def test_every_image_at_most_once_an_epoch_over_three_ranks(train_set, make_loader):
    loaders = [make_loader(numbered(train_set), rank=rank, world_size=3) for rank in range(3)]
    steps = loaders[0].steps_per_epoch
    assert (len(train_set), steps) == (51, 4)
    assert loaders[0].dropped_per_epoch == 3
    epochs = [
        [int(y) for _ in range(steps) for loader in loaders for y in next(loader).y_B]
        for _ in range(3)
    ]
    for seen in epochs:
        assert len(seen) == 48
        assert max(Counter(seen).values()) == 1
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # the epochs drop different images
    assert len(set(epochs[0]) | set(epochs[1]) | set(epochs[2])) == 51


@BOTH
def test_streams_are_equal_by_seed_and_differ_by_seed(photo_set, make_loader, backend):
    first, again, other = (
        take(make_loader(numbered(photo_set), backend=backend, seed=s, threads=t), 3)
        for s, t in ((5, 1), (5, 2), (6, 2))
    )
    assert_equal_trees(first, again)
    assert not torch.equal(first[0].x1_BCHW, other[0].x1_BCHW)
    assert not torch.equal(first[0].y_B, other[0].y_B)


@BOTH
def test_an_image_has_other_views_by_seed_and_epoch(photo_set, make_loader, backend):
    whole = {"backend": backend, "batch_size": len(photo_set)}
    one, other = (take(make_loader(numbered(photo_set), seed=s, **whole), 2) for s in (5, 6))
    views = [batch.x1_BCHW[batch.y_B.argsort()] for batch in (*one, *other)]
    for a, b in combinations(views, 2):
        assert ((a - b).flatten(1).abs().amax(1) > 0).all()


@BOTH
@pytest.mark.parametrize("k", [1, 11, 12, 17])
def test_resume_is_bit_exact(make_loader, backend, k):
    """With 12 steps per epoch: within an epoch, and before, at and after its end."""
    whole = make_loader(backend=backend)
    assert whole.steps_per_epoch == 12
    take(whole, k)
    resumed = make_loader(backend=backend, start_step=k)
    assert_equal_trees(take(whole, 14), take(resumed, 14))


@BOTH
def test_a_global_batch_does_not_depend_on_the_number_of_ranks(make_loader, backend):
    one = make_loader(backend=backend, batch_size=8)
    two = [make_loader(backend=backend, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    # 6 steps per epoch, so this crosses an epoch's end
    for _ in range(8):
        whole = next(one)
        pieces = [next(loader) for loader in two]
        assert torch.equal(whole.y_B, torch.cat([piece.y_B for piece in pieces]))
        views = [*(piece.x1_BCHW for piece in pieces), *(piece.x2_BCHW for piece in pieces)]
        # matrix products on the CPU may round to another level at another batch size
        allowed = 0 if backend == "dali" else 1e-3
        assert ((whole.x_NCHW - torch.cat(views)).abs() > allowed).float().mean() <= allowed


@BOTH
def test_batches_have_the_promised_layout_and_dtype(make_loader, recipe, backend):
    """With DALI, 16-bit views are the float32 views of the same step, rounded once."""
    whole = take(make_loader(backend=backend), 3)
    assert not torch.equal(whole[0].x1_BCHW, whole[0].x2_BCHW)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        batches = take(make_loader(backend=backend, dtype=dtype), 3)
        for ours, theirs in zip(batches, whole, strict=True):
            assert ours.x_NCHW.shape == (8, 3, recipe.crop, recipe.crop)
            assert ours.x_NCHW.dtype == dtype
            assert ours.x_NCHW.is_contiguous(memory_format=torch.channels_last)
            assert backend == "resident" or torch.equal(ours.x_NCHW, theirs.x_NCHW.to(dtype))
            assert ours.y_B.dtype == torch.int64
            assert torch.equal(ours.y_B, theirs.y_B)


@BOTH
def test_kept_batches_stay_as_they_were(make_loader, backend):
    """Neither later batches nor closing the loader overwrites them."""
    loader = make_loader(backend=backend)
    kept = take(loader, 14)
    copies = [Batch(*(x.clone() for x in batch)) for batch in kept]
    take(loader, 14)
    loader.close()
    take(make_loader(backend=backend, seed=9), 6)
    assert_equal_trees(kept, copies)
    with pytest.raises(RunError, match="make a new one"):
        next(loader)


@BOTH
def test_clean_images_are_exactly_the_files(tmp_path, backend):
    """PNGs of the recipe's size: the loader's values are (p / 255 - mean) / std, nothing else."""
    recipe = recipe_for("cifar10")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    for k, image in enumerate(pixels):
        folder = tmp_path / "val" / f"class{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{k}.png")
    dataset = open_dataset(tmp_path, "val")
    indices = [6, 0, 3, 3, 1]
    loader = eval_loader(dataset, recipe, indices, backend=backend)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [2, 2, 1]
    assert len(loader) == 3
    order = [int(Path(path).stem) for path in dataset.paths]
    raw = pixels[[order[index] for index in indices]].astype(np.float64) / 255
    expected = (raw - np.array(recipe.mean)) / np.array(recipe.std)
    x_BCHW = torch.cat([x for x, _ in batches])
    assert x_BCHW.dtype == torch.float32
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert np.abs(x_BCHW.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5
    assert torch.cat([y for _, y in batches]).tolist() == [dataset.labels[i] for i in indices]


LZW = {"compression": "tiff_lzw"}
PAGES = {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}


@pytest.mark.parametrize(
    ("backend", "device"),
    [("dali", "cpu"), ("resident", "cpu"), pytest.param("dali", "cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        ("webp", "RGB", {"lossless": True}),
        ("webp", "RGBA", {"lossless": True, "exact": True}),
        ("bmp", "RGB", {}),
        ("tif", "RGB", {}),
        ("tiff", "RGB", LZW),
        ("tiff", "RGB", PAGES),
        ("tiff", "RGBA", LZW),
        ("tiff", "16 bits", {}),
    ],
)
def test_other_formats(tmp_path, backend, device, suffix, mode, options):
    """With transparency on white, 16 bits reduced to 8, and the first of several pages."""
    channels = {"RGB": 3, "RGBA": 4, "16 bits": 1}[mode]
    random = np.random.default_rng(0)
    pixels_HWC = random.integers(0, 256, (32, 32, channels), dtype=np.uint8)
    stored = pixels_HWC[:, :, 0] * np.uint16(257) if channels == 1 else pixels_HWC
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.fromarray(stored).save(tmp_path / "val" / "a" / f"x.{suffix}", **options)
    dataset = checked(tmp_path, "val")
    recipe = recipe_for("cifar10")
    ((x, _),) = eval_loader(dataset, recipe, [0], backend=backend, device=torch.device(device))
    cover_HW1 = pixels_HWC[:, :, 3:] / 255 if mode == "RGBA" else 1
    expected_HW3 = cover_HW1 * pixels_HWC[:, :, :3] + (1 - cover_HW1) * 255
    assert np.abs(levels_of(x.cpu(), recipe)[0] - expected_HW3).max() < 1


@BOTH
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_pictures_are_put_on_white(tmp_path, backend, mode):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    image = image.convert(mode.removesuffix("A")) if mode != "RGBA" else image
    alpha_HW = random.integers(0, 256, (32, 32), dtype=np.uint8)
    alpha_HW[:8], alpha_HW[8:16] = 0, 255
    options = {}
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(alpha_HW))
    else:
        # one colour, that of the first pixel, is transparent
        options = {"transparency": image.getpixel((0, 0))}
        same_HW = np.asarray(image) == np.asarray(image)[0, 0]
        alpha_HW = 255 * ~(same_HW.all(-1) if mode == "RGB" else same_HW)
    (tmp_path / "val" / "a").mkdir(parents=True)
    image.save(tmp_path / "val" / "a" / "x.png", **options)
    rgb_HW3 = np.asarray(image.convert("RGB"))
    cover_HW1 = alpha_HW[:, :, None] / 255
    recipe = recipe_for("cifar10")
    ((x, _),) = eval_loader(open_dataset(tmp_path, "val"), recipe, [0], backend=backend)
    expected_HW3 = cover_HW1 * rgb_HW3 + (1 - cover_HW1) * 255
    assert np.abs(levels_of(x, recipe)[0] - expected_HW3).max() < 1


@BOTH
@pytest.mark.parametrize("size", [(300, 200), (90, 131), (50, 53), (40, 40), (20, 900)], ids=str)
def test_clean_images_of_any_size_are_resized_and_cropped(tmp_path, size, backend):
    coarse = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    (tmp_path / "val" / "a").mkdir(parents=True)
    image.save(tmp_path / "val" / "a" / "x.png")
    recipe = recipe_for("imagefolder", crop=56)
    ((x, _),) = eval_loader(open_dataset(tmp_path, "val"), recipe, [0], backend=backend)
    resized = F.resize(image, recipe.resize_short, InterpolationMode.BICUBIC)
    theirs = np.asarray(F.center_crop(resized, 56), np.float32)
    assert np.abs(levels_of(x, recipe)[0] - theirs).mean() < 0.5


@pytest.mark.parametrize("axis", [0, 1])
def test_of_a_strip_the_middle_alone_is_resized(axis):
    """Resizing the whole strip would take 400 GB."""
    strip = np.repeat(np.arange(3, dtype=np.uint8), 700_001)[None, :, None].repeat(3, 2)
    clean = clean_image(recipe_for("imagefolder"), strip if axis else strip.swapaxes(0, 1))
    assert clean.shape == (224, 224, 3) and (clean == 1).all()


# 1: fewer batches than are prefetched
@BOTH
@pytest.mark.parametrize("count", [15, 1])
def test_evaluation_starts_again_after_a_break(val_set, recipe, backend, count):
    loader = eval_loader(val_set, recipe, range(count), backend=backend)
    whole = list(loader)
    assert sum(len(y) for _, y in whole) == count
    for stop in (1, 3, 7):
        for _ in islice(loader, stop):
            pass
        assert_equal_trees(list(loader), whole)
    assert len(whole) == len(loader)


def test_digits_views_are_affine_and_unmirrored(digits, make_loader):
    """With a recipe of nearly zero strengths, the view is the resized digit itself."""
    recipe = recipe_for("digits")
    assert recipe.view1.flip_p == 0 and recipe.view1.has_affine
    nothing = {"degrees": 0.001, "translate": 0.0, "scale": (1.0, 1.0), "shear": 0.0}
    still = recipe.view1.model_copy(update={**nothing, "jitter_p": 0.0})
    dataset = numbered(checked(digits))
    batch = next(make_loader(dataset, replace(recipe, view1=still), batch_size=32))
    ((x, _),) = eval_loader(dataset, recipe, batch.y_B.numpy(), batch_size=32)
    # 1.5 levels, over the smallest std
    assert (batch.x1_BCHW - x).abs().max() < 1.5 / 255 / min(recipe.std)
    assert (batch.x2_BCHW - x).abs().mean() > 0.05


@pytest.mark.parametrize(
    "spoil",
    [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-30])],
    ids=["deleted", "cut"],
)
def test_a_file_spoiled_during_the_run_is_named(root, make_loader, recipe, spoil):
    """DALI never sees it, since its decoder can crash the whole process."""
    dataset = checked(root)
    loader = make_loader(dataset, batch_size=51)
    next(loader)
    spoil(root / dataset.paths[7])
    with pytest.raises(RunError, match=f"{dataset.paths[7]} is not as it was.*continue"):
        take(loader, 6)
    with pytest.raises(RunError, match="make a new one"):
        next(loader)
    # more than the limit, so that DALI reads them one by one
    small = {"backend": "resident", "resident_limit_gb": 1e-6}
    evaluation = eval_loader(dataset, recipe, [3, 7], batch_size=1, **small)
    with pytest.raises(RunError, match=dataset.paths[7]):
        list(evaluation)


@pytest.mark.slow
def test_memory_stays_flat(pictures):
    """In a separate process, where nothing else allocates memory."""
    assert forked(_use_no_more_memory, pictures, environments=[environment()]) == [0]


def _use_no_more_memory(root: Path) -> None:
    recipe = recipe_for("tinyimagenet", crop=16)
    options = {"batch_size": 16, "seed": 0, "device": torch.device("cpu"), "threads": 2}
    loader = TrainLoader("dali", open_dataset(root, "train"), recipe, **options)
    for _ in range(100):
        next(loader)
    before = psutil.Process().memory_info().rss
    # a leak would keep 39 MB of pixels
    for _ in range(400):
        next(loader)
    assert psutil.Process().memory_info().rss - before < 8 * 2**20


def test_too_few_images_are_refused(make_loader):
    with pytest.raises(UserError, match=r"51 images, fewer than one global batch of 60"):
        make_loader(batch_size=30, world_size=2)


@pytest.mark.parametrize("check", ["full", "headers", "off"])
def test_views_do_not_depend_on_the_check(pictures, train_set, make_loader, check):
    """Without a check, sizes come from the headers of each batch's files."""
    dataset = checked(pictures, check=check)
    assert (dataset.sizes is None) is (check == "off")
    assert_equal_trees(take(make_loader(dataset), 14), take(make_loader(train_set), 14))


WITHOUT_DALI = """
import sys
sys.modules["nvidia"] = None  # as where it is not installed
import torch, isofast.data as data
from isofast.data.check import has_dali
assert not has_dali()
root, cpu = sys.argv[1], torch.device("cpu")
train, val = (data.check_folder(data.open_dataset(root, split)) for split in ("train", "val"))
recipe = data.recipe_for("cifar10", crop=16)
common = dict(batch_size=8, device=cpu, threads=1)
loader = data.TrainLoader("auto", train, recipe, seed=0, **common)
assert loader.backend == "resident" and next(loader).x1_BCHW.shape == (8, 3, 16, 16)
batches = list(data.EvalLoader(loader.backend, val, recipe, range(9), **common))
assert [len(y_B) for _, y_B in batches] == [8, 1]
for backend, recipe in (("dali", recipe), ("auto", data.recipe_for("digits"))):
    try:
        data.TrainLoader(backend, train, recipe, seed=0, **common)
    except data.loaders.UserError as error:
        assert "pip install nvidia-dali-cuda130" in str(error), error
    else:
        raise AssertionError("no error")
"""


@pytest.mark.slow
def test_small_sets_train_and_evaluate_without_dali(digits):
    """What needs DALI fails with the remedy; nothing imports it."""
    call([sys.executable, "-c", WITHOUT_DALI, str(digits)])
