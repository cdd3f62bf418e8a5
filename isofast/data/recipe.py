"""The one augmentation table: what each data set's two views and its clean images are made of.

Nothing here touches an image. `isofast.data.draw` turns a row of the table into numbers for given
images, and a backend executes those numbers. The order of operations is the same everywhere: crop,
affine, colour (brightness, contrast, saturation and hue; one map for all of them in DALI, in the
drawn order where images are resident), gray, blur, solarize, flip, normalise.
"""

from dataclasses import dataclass, replace

from isofast.errors import UserError

Range = tuple[float, float]
RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViewRecipe:
    """How one random view of an image is made; the defaults are the paper's first view.

    Colour strengths s mean a factor from U(max(0, 1 - s), 1 + s); `hue` is a share of the colour
    circle, from U(-hue, hue). Lengths are fractions of the crop, angles degrees. Probabilities are
    per image. An affine of (0, 0, (1, 1), 0) costs nothing: the operation is left out.
    """

    crop_scale: Range = (0.08, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    degrees: float = 0.0
    translate: float = 0.0
    scale: Range = (1.0, 1.0)
    shear: float = 0.0
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: Range = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_threshold: int = 128
    flip_p: float = 0.5

    def __post_init__(self) -> None:
        """Raise ValueError where a field is outside what the operations can do."""
        for name in ("jitter_p", "gray_p", "blur_p", "solarize_p", "flip_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a probability, 0 to 1")
        for name in ("crop_scale", "crop_ratio", "scale", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise ValueError(f"{name} is ({low}, {high}); it needs 0 < low <= high")
        if self.crop_scale[1] > 1.0:
            raise ValueError(f"crop_scale is {self.crop_scale}; a crop is at most the whole, 1.0")
        for name in ("degrees", "translate", "shear", "brightness", "contrast", "saturation"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a strength, 0 or more")
        if not 0.0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}; it is a share of the colour circle, 0 to 0.5")
        if not 0 <= self.solarize_threshold <= 255:
            raise ValueError(f"solarize_threshold is {self.solarize_threshold}; it is 0 to 255")

    @property
    def has_affine(self) -> bool:
        """Whether any image is rotated, moved, scaled or sheared."""
        return (self.degrees, self.translate, self.scale, self.shear) != (0.0, 0.0, (1.0, 1.0), 0.0)

    @property
    def has_colour(self) -> bool:
        """Whether any image changes colour (jitter or gray)."""
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        return self.gray_p > 0.0 or (self.jitter_p > 0.0 and any(strengths))


@dataclass(frozen=True)
class Recipe:
    """Both views, the clean images and the normalisation of one data set.

    `crop` is the side of every image that comes out, in pixels. Clean (validation) images are
    resized so that the short side is `resize_short` pixels, and cropped in the middle. `mean` and
    `std` are per channel, for pixels in [0, 1].
    """

    name: str
    crop: int
    resize_short: int
    mean: RGB
    std: RGB
    view1: ViewRecipe
    view2: ViewRecipe

    def __post_init__(self) -> None:
        """Raise ValueError where the sizes or the normalisation make no sense."""
        if self.crop < 1 or self.resize_short < self.crop:
            raise ValueError(
                f"crop is {self.crop} and resize_short is {self.resize_short}; "
                "they need 1 <= crop <= resize_short"
            )
        if min(self.std) <= 0.0:
            raise ValueError(f"std is {self.std}; every channel needs more than 0")


def _preset(name: str, crop: int, mean: RGB, std: RGB, resize_short: int | None = None) -> Recipe:
    view1, view2 = ViewRecipe(), ViewRecipe(solarize_p=0.2)
    return Recipe(
        name, crop, crop if resize_short is None else resize_short, mean, std, view1, view2
    )


# 8x8 gray digits: no flip (a mirrored 2 is no digit), no crop that could lose a stroke
_DIGIT_VIEW = ViewRecipe(
    crop_scale=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    degrees=12.0,
    translate=0.08,
    scale=(0.85, 1.15),
    shear=8.0,
    saturation=0.0,
    hue=0.0,
    gray_p=0.0,
    flip_p=0.0,
)
_STL10 = _preset("stl10", 96, (0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261))

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("digits", 16, 16, (0.305,) * 3, (0.376,) * 3, _DIGIT_VIEW, _DIGIT_VIEW),
        _preset("cifar10", 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        _preset("cifar100", 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        replace(
            _STL10,
            view1=replace(_STL10.view1, blur_p=1.0),
            view2=replace(_STL10.view2, blur_p=0.1),
        ),
        _preset("tinyimagenet", 64, IMAGENET_MEAN, IMAGENET_STD),
        _preset("imagefolder", 224, IMAGENET_MEAN, IMAGENET_STD, resize_short=256),
    )
}


def recipe_for(name: str, *, crop: int | None = None) -> Recipe:
    """Give the preset of a data set, at another size where `crop` (pixels) is given.

    With another crop the clean images keep the preset's proportion of resize to crop.

    Raises:
        UserError: no preset has that name, or the crop is not positive.
    """
    if name not in RECIPES:
        raise UserError(
            f"there is no augmentation preset {name!r}; allowed are {', '.join(RECIPES)}. "
            "For a folder of your own use 'imagefolder'."
        )
    recipe = RECIPES[name]
    if crop is None:
        return recipe
    if crop < 1:
        raise UserError(f"the crop is {crop} pixels; give 1 or more (preset: {recipe.crop})")
    short = round(crop * recipe.resize_short / recipe.crop)
    return replace(recipe, crop=crop, resize_short=short)
