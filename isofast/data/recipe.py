"""The recipe of each data set: sizes, normalisation and the two views.

Nothing here touches an image: `isofast.data.draw` turns a view's settings into parameters for given
images, and a backend applies them. The order of operations is the same everywhere: crop, affine,
colour (brightness, contrast, saturation and hue; in one map with DALI, in the drawn order for
resident images), gray, blur, solarize, flip, normalise.
"""

from dataclasses import dataclass

from isofast.config.presets import VIEWS_OF_DATASET
from isofast.config.schema import AugmentationConfig, ViewConfig

RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """Both views, the clean images and the normalisation of one data set.

    `crop` is the side of every output image, in pixels. Clean (validation) images are resized so
    that the short side is `resize_short` pixels, and centre-cropped. `mean` and `std` are per
    channel, for pixels in [0, 1].
    """

    name: str
    crop: int
    resize_short: int
    mean: RGB
    std: RGB
    view1: ViewConfig
    view2: ViewConfig


_SIZES: dict[str, tuple[int, int, RGB, RGB]] = {
    "digits": (16, 16, (0.305,) * 3, (0.376,) * 3),
    "cifar10": (32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (32, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": (96, 96, (0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
    "tinyimagenet": (64, 64, IMAGENET_MEAN, IMAGENET_STD),
    "imagefolder": (224, 256, IMAGENET_MEAN, IMAGENET_STD),
}


def recipe_for(
    name: str, *, crop: int | None = None, augmentation: AugmentationConfig | None = None
) -> Recipe:
    """Return the recipe of a data set.

    Args:
        name: the data set, as in data.dataset.
        crop: overrides the side, in pixels; clean images keep the ratio of resize to crop.
        augmentation: overrides the preset's views.
    """
    side, short, mean, std = _SIZES[name]
    if crop is not None:
        side, short = crop, round(crop * short / side)
    views = augmentation or AugmentationConfig.model_validate(VIEWS_OF_DATASET[name])
    return Recipe(name, side, short, mean, std, views.view1, views.view2)
