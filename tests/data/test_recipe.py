"""The augmentation table against the paper's, number by number, and what it refuses."""

import json

import pytest

from isofast.config.load import validate
from isofast.config.schema import ViewConfig, to_json
from isofast.data.recipe import recipe_for
from isofast.errors import UserError

# the first view of CIFAR and TinyImageNet; written out, so that no default can drift
VIEW = {
    "crop_scale": (0.08, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "degrees": 0.0,
    "translate": 0.0,
    "scale": (1.0, 1.0),
    "shear": 0.0,
    "jitter_p": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "gray_p": 0.2,
    "blur_p": 0.0,
    "blur_sigma": (0.1, 2.0),
    "solarize_p": 0.0,
    "solarize_threshold": 128,
    "flip_p": 0.5,
}
DIGIT_VIEW = VIEW | {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "degrees": 12.0,
    "translate": 0.08,
    "scale": (0.85, 1.15),
    "shear": 8.0,
    "saturation": 0.0,
    "hue": 0.0,
    "gray_p": 0.0,
    "flip_p": 0.0,
}
SOLARIZED = VIEW | {"solarize_p": 0.2}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# crop, short side of clean images, mean, std, first view, second view
TABLE = {
    "digits": (16, 16, (0.305, 0.305, 0.305), (0.376, 0.376, 0.376), DIGIT_VIEW, DIGIT_VIEW),
    "cifar10": (32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), VIEW, SOLARIZED),
    "cifar100": (32, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), VIEW, SOLARIZED),
    "stl10": (
        96,
        96,
        (0.4914, 0.4823, 0.4466),
        (0.247, 0.243, 0.261),
        VIEW | {"blur_p": 1.0},
        SOLARIZED | {"blur_p": 0.1},
    ),
    "tinyimagenet": (64, 64, *IMAGENET, VIEW, SOLARIZED),
    "imagefolder": (224, 256, *IMAGENET, VIEW, SOLARIZED),
}


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_the_papers(name):
    keys = ("name", "crop", "resize_short", "mean", "std", "view1", "view2")
    recipe = recipe_for(name)
    views = {"view1": recipe.view1.model_dump(), "view2": recipe.view2.model_dump()}
    assert vars(recipe) | views == dict(zip(keys, (name, *TABLE[name]), strict=True))


def test_a_run_can_set_every_strength():
    raw = {"data": {"dataset": "stl10", "root": "x"}}
    view2 = 'data={"augmentation": {"view2": {"scale": [0.5, 2]}}}'
    overrides = ["data.augmentation.view1.jitter_p=0.5", view2]
    data = validate(raw, overrides).data
    recipe = recipe_for("stl10", augmentation=data.augmentation)
    assert recipe.view1.model_dump() == TABLE["stl10"][4] | {"jitter_p": 0.5}
    assert recipe.view2.model_dump() == TABLE["stl10"][5] | {"scale": (0.5, 2.0)}
    stored = json.loads(to_json(validate(raw, overrides)))
    assert stored["data"]["augmentation"]["view1"]["blur_p"] == 1.0
    assert validate(stored).data == data


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("view1.jiter_p=1", "view1.jiter_p: unknown key. Did you mean data.augmentation.view1.jit"),
        ("view2.flip_p=1.5", r"view2.flip_p: got 1.5; .* less than or equal to 1"),
        ("view2.crop_scale=[0, 1]", r"view2.crop_scale: .* 0 < low <= high"),
        ("view2.crop_scale=[0.5, 2]", "view2.crop_scale: "),
        ("view1.hue=0.7", "view1.hue: got 0.7"),
        ("view2.blur_sigma=3", "view2.blur_sigma: got 3; .* tuple"),
        ("view3={}", "view3: unknown key. Did you mean data.augmentation.view"),
    ],
)
def test_an_impossible_strength_is_refused_by_its_key(override, words):
    with pytest.raises(UserError, match=words):
        validate({"data": {"root": "x"}}, [f"data.augmentation.{override}"])


STILL = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gray_p": 0.0}


@pytest.mark.parametrize(
    ("changes", "affine", "colour"),
    [
        ({}, False, False),
        *(({name: 0.1}, True, False) for name in ("degrees", "translate", "shear")),
        ({"scale": (0.9, 1.0)}, True, False),
        *(({name: 0.1}, False, True) for name in STILL),
        ({"hue": 0.1, "jitter_p": 0.0}, False, False),
    ],
)
def test_each_strength_alone_turns_its_transform_on(changes, affine, colour):
    view = ViewConfig(**STILL | changes)
    assert (view.has_affine, view.has_colour) == (affine, colour)


def test_another_crop_keeps_the_proportion():
    recipe = recipe_for("imagefolder", crop=112)
    assert (recipe.crop, recipe.resize_short) == (112, 128)
