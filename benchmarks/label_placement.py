"""Put labels beside the points of a figure, where they cover nothing."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

# Distances from the point in typographic points, and the directions (right, up), best ones first
DISTANCES = (7, 18, 32, 48, 70)
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
HORIZONTAL = {1: "left", 0: "center", -1: "right"}
VERTICAL = {1: "bottom", 0: "center", -1: "top"}


def place_labels(
    axis: Axes, labels: Sequence[tuple[str, float, float]], taken: Sequence[Bbox]
) -> list[Bbox]:
    """Label points, each as near to its point as free space allows, and draw a line to it
    from farther away.

    labels: text, x and y in data coordinates; taken: boxes in pixels that are to stay free, such as
    those of the points. The axes must not be changed afterwards. Returns the labels' boxes.
    """
    free_of = list(taken)
    for text, x, y in labels:
        annotation = axis.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.5", "shrinkB": 5},
        )
        places = [(distance, *where) for distance in DISTANCES for where in DIRECTIONS]
        # The first of equally good ones, which is the nearest
        best = min(places, key=lambda place: covered(axis, move(annotation, *place), free_of))
        free_of.append(move(annotation, *best))
        # Beside its point a label needs no line
        annotation.arrow_patch.set_visible(best[0] > DISTANCES[0])
    return free_of[len(taken) :]


def move(annotation: Annotation, distance: float, right: int, up: int) -> Bbox:
    """Move a label to a side of its point, and return the pixels of its text."""
    annotation.xyann = (distance * right, distance * up)
    annotation.set(ha=HORIZONTAL[right], va=VERTICAL[up])
    renderer = annotation.figure.canvas.get_renderer()
    annotation.update_positions(renderer)
    # The annotation's own extent includes its line
    return Text.get_window_extent(annotation, renderer)


def covered(axis: Axes, box: Bbox, taken: Sequence[Bbox]) -> float:
    """Pixels of a box that lie on others or outside the axes."""
    overlaps = [Bbox.intersection(box, other) for other in taken]
    inside = Bbox.intersection(box, axis.bbox)
    outside = area(box) - (area(inside) if inside else 0)
    return outside + sum(area(overlap) for overlap in overlaps if overlap)


def area(box: Bbox) -> float:
    return box.width * box.height
