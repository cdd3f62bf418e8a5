"""What a data set, the length of a run and a method imply, filled in where the user says nothing.

The values are those of the paper (Halvagal, Laborieux, Zenke, NeurIPS 2023) and of its authors'
released code, fmi-basel/implicit-var-reg; the comments name which one where the two differ. Digits,
image folders and AdamW are in neither: their values are this library's. What a method implies of
itself stands with its Config.
"""

from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]

# The first layers that the paper uses with each data set.
STEM_OF_DATASET = {
    "digits": "cifar",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "stl10": "imagenet",
    "tinyimagenet": "tiny",
    "imagefolder": "imagenet",
}

# What each data set's views have that ViewConfig's defaults have not: the paper's first view is the
# default, and its second solarizes.
_SOLARIZED: Tree = {"solarize_p": 0.2}
# 8 x 8 gray digits: no flip (a mirrored 2 is no digit), no crop that could lose a stroke
_DIGIT_VIEW: Tree = {
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
VIEWS_OF_DATASET: dict[str, Tree] = {
    "digits": {"view1": _DIGIT_VIEW, "view2": _DIGIT_VIEW},
    "cifar10": {"view2": _SOLARIZED},
    "cifar100": {"view2": _SOLARIZED},
    "stl10": {"view1": {"blur_p": 1.0}, "view2": {"blur_p": 0.1, **_SOLARIZED}},
    "tinyimagenet": {"view2": _SOLARIZED},
    "imagefolder": {"view2": _SOLARIZED},
}

# A method's name in a config, and its class. Any other class is named module:Class.
METHODS = {
    "isoloss": "isofast.methods.closed_form:IsoLoss",
    "directpred": "isofast.methods.closed_form:DirectPred",
    "directcopy": "isofast.methods.closed_form:DirectCopy",
    "byol": "isofast.methods.trained:BYOL",
    "simsiam": "isofast.methods.trained:SimSiam",
    "linear": "isofast.methods.trained:Linear",
}
_CLOSED_FORMS = ("isoloss", "directpred", "directcopy")

_PEAK_LR = {"lars": 1.0, "sgd": 0.1, "adamw": 1e-3}

# Runs of fewer epochs, and data sets that the paper does not have, get C of directions and an
# optimizer to go with it, both ours (docs/method/first-steps.md).
SHORT_RUN_EPOCHS = 100
_PAPER_DATASETS = ("cifar10", "cifar100", "stl10", "tinyimagenet")


def correlation_preset(dataset: str, epochs: int, method: Mapping[str, Any]) -> Tree:
    """method.correlation of the built-in methods."""
    ours = epochs < SHORT_RUN_EPOCHS or dataset not in _PAPER_DATASETS
    if method["name"] in METHODS and ours and method.get("metric", "cosine") == "cosine":
        return {"correlation": "directions"}
    return {}


def optimizer_preset(method: str, correlation: str, ema: bool, chosen: str) -> Tree:
    """The optimizer of a method; a method that is not built in has SimSiam's.

    Args:
        method: its name.
        correlation: method.correlation. The values for C of directions are from
            bench/results/first-steps.md; a trained predictor is not made of C, but is in the same
            kind of run.
        ema: method.ema.
        chosen: optimizer.name as the user gives it, or any other text.
    """
    closed = method in _CLOSED_FORMS
    if method not in METHODS:
        name, lr = "sgd", 0.1
    elif correlation == "directions" and closed:
        name, lr = ("adamw", 4e-3) if ema else ("sgd", 0.3)
    else:
        name, lr = ("lars", 1.0) if ema and correlation == "embeddings" else ("sgd", 0.1)
    if chosen in _PEAK_LR and chosen != name:
        name, lr = chosen, _PEAK_LR[chosen]
    # The released table's runs; the paper's closed forms have 4e-4. A linear predictor, for which
    # neither gives one, has that of the closed forms it is compared with.
    return {"name": name, "lr": lr, "weight_decay": 1e-4 if closed or method == "linear" else 1e-5}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """``base`` with the values of ``over`` on top, section by section; neither is changed."""
    merged: Tree = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged
