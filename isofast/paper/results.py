"""The paper's results: tables 2 and 3, top-1 in percent, five seeds each.

The paper's two tables are split here by the predictor's power, so that each compares methods that
differ in one thing: table 2 has the trained predictors and alpha 0.5, table 3 has alpha 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isofast.run.stored import TITLES

DATASETS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "stl10": "STL-10",
    "tinyimagenet": "TinyImageNet",
}


@dataclass(frozen=True)
class Row:
    """A method of a table, and what the paper has for it."""

    method: str
    """method.name."""
    alpha: float | None
    """method.alpha; None where the predictor is trained."""
    ema: bool
    """method.ema."""
    reported: Mapping[str, str]
    """The paper's cells by data set, as printed."""

    @property
    def title(self) -> str:
        """Its name in the table."""
        return TITLES[self.method]

    @property
    def folder(self) -> str:
        """Its name on the disk."""
        return self.method if self.ema or self.method == "simsiam" else f"{self.method}-no-ema"

    @property
    def settings(self) -> dict[str, Any]:
        """Its method section of a config."""
        alpha = {} if self.alpha is None else {"alpha": self.alpha}
        return {"name": self.method, "ema": self.ema, **alpha}


def _row(method: str, alpha: float | None, ema: bool, *cells: str) -> Row:
    return Row(method, alpha, ema, dict(zip(DATASETS, cells, strict=True)))


TABLES: dict[str, tuple[Row, ...]] = {
    "table2": (
        _row("byol", None, True, "92.6", "70.5", "91.7", "38.3"),
        _row("simsiam", None, False, "90.7", "66.3", "87.5", "39.8"),
        _row("directpred", 0.5, True, "92.0", "66.6", "88.8", "40.1"),
        _row("directpred", 0.5, False, "12.1 (crashed)", "1.6", "10.4", "1.3"),
        _row("isoloss", 0.5, True, "91.5", "69.0", "89.0", "44.8"),
        _row("isoloss", 0.5, False, "91.5", "64.3", "87.4", "40.4"),
    ),
    "table3": (
        _row("directcopy", 1.0, True, "91.3", "68.7", "89.3", "45.3"),
        _row("directcopy", 1.0, False, "12.1 (crashed)", "1.5", "10.3", "0.6"),
        _row("isoloss", 1.0, True, "91.5", "69.3", "89.1", "45.6"),
        _row("isoloss", 1.0, False, "91.4", "63.0", "86.9", "38.5"),
    ),
}
