"""What "best" means: the number of the validation split by which train.select chooses weights.

One place for all that uses it: the best checkpoint, the screen, result.json, the card, and the
tables and searches of sweeps.
"""

from collections.abc import Mapping
from typing import Any

# The values of train.select, as they are called on a screen
CRITERIA = {
    "top1": "top-1",
    "balanced_top1": "balanced accuracy",
    "macro_f1": "macro F1",
    "loss": "loss",
}
# Those in which every class counts alike
OF_CLASSES = ("balanced_top1", "macro_f1")


def score(select: str, value: float) -> float:
    """Return what is maximized: the number itself, or the negative loss."""
    return -value if select == "loss" else value


def score_of(result: Mapping[str, Any]) -> float | None:
    """Return the score of a run's best checkpoint from its result.json; None where it has none."""
    # Earlier versions selected by top-1 alone, and did not say so
    select = result.get("select", "top1")
    value = result.get(f"val_{select}")
    return None if value is None else score(select, value)


def logged_beside(select: str, unbalanced: bool) -> tuple[str, ...]:
    """Return the metrics that evaluations show and log beside loss, top-1 and top-5.

    They are the same as top-1, or nearly, where the classes are of equal size.
    """
    return OF_CLASSES if unbalanced or select in OF_CLASSES else ()


def describe(select: str, value: float) -> str:
    """Return a metric and its value in words: "macro F1 46.15%", "loss 0.4512"."""
    return f"{CRITERIA[select]} {describe_value(select, value)}"


def describe_value(select: str, value: float) -> str:
    return f"{value:.4f}" if select == "loss" else f"{value:.2%}"
