"""What a data set and a method imply, filled in where the user says nothing.

The values and their sources: the table "Networks and training" and the list below it in the
paper's appendix and the authors' released code; the comments name which one where they differ.
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

# The closed-form predictors: how each reads the eigenvalue filter and the gradient.
METHODS: dict[str, Tree] = {
    "isoloss": {"alpha": 0.5},
    "directpred": {"alpha": 0.5},
    "directcopy": {"alpha": 1.0},
}


def preset(raw: Mapping[str, Any]) -> Tree:
    """The settings implied by the data set and the method named in ``raw``, as a tree of sections.

    ``raw`` is what the user gave, not yet validated: values of a wrong kind are ignored here and
    refused by the validation that follows.
    """
    data, method = _section(raw, "data"), _section(raw, "method")
    name = method.get("name", "isoloss")
    implied = dict(METHODS.get(name, {})) if isinstance(name, str) else {}
    alpha = method.get("alpha", implied.get("alpha", 0.5))
    ema = method.get("ema", True) is not False
    dataset = data.get("dataset", "imagefolder")

    # The released code shifts the spectrum by 0.25 at alpha 1 and not at all at alpha 0.5.
    implied["eps"] = 0.25 if alpha == 1 else 0.0
    # Spectral normalisation fixes W's largest eigenvalue at 1, which leaves the Euclidean
    # losses ("around one") without meaning.
    implied["normalize"] = "none" if method.get("metric") == "euclidean" else "spectral"
    # The paper gives 0.998; the released code uses 0.5 in its runs without EMA.
    implied["decay"] = 0.998 if ema else 0.5
    optimizer: Tree = (
        {"name": "lars", "lr": 1.0, "weight_decay": 1e-4}
        if ema
        else {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4}
    )
    stem = STEM_OF_DATASET.get(dataset) if isinstance(dataset, str) else None
    return {
        "encoder": {"stem": stem} if stem else {},
        "method": implied,
        "optimizer": optimizer,
    }


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """``base`` with the values of ``over`` on top, section by section; neither is changed."""
    merged: Tree = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}
