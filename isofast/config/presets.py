"""Defaults that depend on the data set, the length of the run and the method.

From the paper (Halvagal, Laborieux, Zenke, NeurIPS 2023) and its authors' released code,
fmi-basel/implicit-var-reg; comments say which where they differ. Values for digits, image folders
and AdamW are ours. A method's own defaults are in its Config.
"""

from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]

# The first layers that the paper uses with each data set.
_STEM_OF_DATASET = {
    "digits": "cifar",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "stl10": "imagenet",
    "tinyimagenet": "tiny",
    "imagefolder": "imagenet",
}

# Over ViewConfig's defaults, the paper's first view; its second solarizes.
_SOLARIZED: Tree = {"solarize_p": 0.2}
# 8 x 8 gray digits: no flip (a mirrored 2 is no digit), no crop (it could lose a stroke)
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

# Built-in methods and their classes; any other is named module:Class.
METHODS = {
    "isoloss": "isofast.methods.closed_form:IsoLoss",
    "directpred": "isofast.methods.closed_form:DirectPred",
    "directcopy": "isofast.methods.closed_form:DirectCopy",
    "byol": "isofast.methods.trained:BYOL",
    "simsiam": "isofast.methods.trained:SimSiam",
    "linear": "isofast.methods.trained:Linear",
    "sigreg": "isofast.methods.sigreg:SIGReg",
}
_CLOSED_FORMS = ("isoloss", "directpred", "directcopy")

_PEAK_LR = {"lars": 1.0, "sgd": 0.1, "adamw": 1e-3}

# Shorter runs, and data sets outside the paper, get C of directions, and a target and an optimizer
# that go with it; all ours (docs/method/first-steps.md).
SHORT_RUN_EPOCHS = 100
_PAPER_DATASETS = ("cifar10", "cifar100", "stl10", "tinyimagenet")


def stem_preset(dataset: str, crop: int | None) -> str:
    """The first layers; a folder of small images has those of the paper's images of that size."""
    if dataset == "imagefolder" and crop is not None and crop <= 64:
        return "cifar" if crop <= 32 else "tiny"
    return _STEM_OF_DATASET[dataset]


def method_preset(dataset: str, epochs: int, method: Mapping[str, Any]) -> Tree:
    """Return what a short run, or a data set outside the paper, implies for a built-in method.

    Its target and C must not lag by a large share of the run: 0.9 forgets in 10 steps, where the
    paper's 0.99 and 0.998 take 100 and 500.
    """
    ours = epochs < SHORT_RUN_EPOCHS or dataset not in _PAPER_DATASETS
    cosine = method.get("metric", "cosine") == "cosine"
    directions = method.get("correlation", "directions") == "directions"
    # sigreg's embeddings should be normal themselves, not their directions
    known = method["name"] in METHODS and method["name"] != "sigreg"
    if not (ours and cosine and directions and known):
        return {}
    preset: Tree = {"correlation": "directions"}
    if method["name"] in _CLOSED_FORMS:
        if method.get("ema", True):
            preset |= {"ema_base": 0.9, "decay": 0.9}
        if dataset == "imagefolder":
            # C of the step's own batch
            preset["decay"] = 0.0
    return preset


def optimizer_preset(method: str, correlation: str, ema: bool, chosen: str) -> Tree:
    """Return the optimizer of a method; your own methods have SimSiam's.

    Args:
        method: method.name.
        correlation: method.correlation, which marks short runs for trained predictors too; the
            values for directions are from bench/results/first-steps.md.
        ema: method.ema.
        chosen: optimizer.name as given by the user, or any other text.
    """
    closed = method in _CLOSED_FORMS
    name, lr = "sgd", 0.1
    if method == "sigreg":
        name, lr = "adamw", _PEAK_LR["adamw"]
    elif method in METHODS and correlation == "directions" and closed:
        lr = 0.3
    elif method in METHODS and correlation == "embeddings" and ema:
        name, lr = "lars", 1.0
    if chosen in _PEAK_LR and chosen != name:
        name, lr = chosen, _PEAK_LR[chosen]
    # The released table's runs; the paper's closed forms have 4e-4. Neither gives one for a linear
    # predictor, which is compared with the closed forms.
    decay = 1e-4 if closed or method == "linear" else 0.05 if method == "sigreg" else 1e-5
    return {"name": name, "lr": lr, "weight_decay": decay}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Return ``base`` with ``over`` laid over it, section by section; neither is changed."""
    merged: Tree = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged
