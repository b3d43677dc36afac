"""Numbers as the page shows them."""

from vit.evaluation.accuracy import wilson_interval

# Keeps a percent sign on the line of its number
NO_BREAK_SPACE = "\u00a0"


def percent(fraction: float) -> str:
    """A fraction as 12.3 %."""
    return f"{100 * fraction:.1f}{NO_BREAK_SPACE}%"


def interval(fraction: float, n: int) -> str:
    """The 95 % interval of a fraction of n, at least one: 10.1 to 14.5 %."""
    low, high = wilson_interval(fraction, n)
    return f"{100 * low:.1f} to {percent(high)}"


def thousands(count: int) -> str:
    """A count as 12,345."""
    return f"{count:,}"
