"""Which of a model's classes the folders of another data set mean: by name, or by wnid."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vit.data.class_folders import imagenet_wnids, is_imagenet, readable_names
from vit.data.splits import first_names
from vit.errors import DataError


def knows_imagenet(classes: Sequence[str]) -> bool:
    """Whether a model's classes are ImageNet's thousand in order: wnids, or names in English.

    Of names with synonyms, "tench, Tinca tinca", the first counts; a few may be spelled otherwise.
    """
    wnids = list(imagenet_wnids())
    if len(classes) != len(wnids) or is_imagenet(classes):
        return is_imagenet(classes)
    pairs = zip(classes, readable_names(wnids), strict=True)
    return sum(name.split(",")[0] == readable for name, readable in pairs) > 900


def in_the_same_order(found: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether two lists name the same classes in the same order, of ImageNet under any names."""
    return list(found) == list(classes) or (knows_imagenet(found) and knows_imagenet(classes))


def only_one_has_names(found: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether one of two lists counts 0, 1, … in place of names, so that only order is left."""
    counting = [list(names) == list(map(str, range(len(names)))) for names in (found, classes)]
    # Numbers may be names, such as those of digits
    return any(counting) and set(found).isdisjoint(classes)


def match_classes(found: Sequence[str], classes: Sequence[str], source: Path) -> list[int]:
    """The index in a model's `classes` of every name that was found at `source`.

    The thousand classes of ImageNet are known by wnid and by English name. Raises DataError for a
    name that the model does not know, or that several of its classes have.
    """
    indices = indices_of_names(classes)
    unknown = [name for name in found if name not in indices]
    if unknown:
        raise DataError(
            f"{source.absolute()}: {len(unknown)} of its {len(found)} classes are not among the "
            f"model's {len(classes):,}: {first_names(unknown)}; folders must have the names of "
            f"the model's classes ({first_names(list(classes))})"
        )
    # ImageNet has two cranes: a bird and a machine
    ambiguous = [name for name in found if len(indices[name]) > 1]
    if ambiguous:
        raise DataError(
            f"{source.absolute()}: several of the model's classes are called {ambiguous[0]}; "
            "call the folder by its wnid"
        )
    return [min(indices[name]) for name in found]


def indices_of_names(classes: Sequence[str]) -> dict[str, set[int]]:
    """{name: the indices of the classes that have it}."""
    lists = [list(classes)]
    if knows_imagenet(classes):
        wnids = list(imagenet_wnids())
        lists += [wnids, readable_names(wnids)]
    indices: dict[str, set[int]] = defaultdict(set)
    for names in lists:
        for index, name in enumerate(names):
            indices[name].add(index)
    return dict(indices)
