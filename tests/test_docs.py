"""README.md and docs/: links lead somewhere, commands are accepted, every option is explained."""

import re
import shlex
from pathlib import Path

import pytest
from composing import check, composed, files_of
from helpers import ROOT

from vit.augment.policies import POLICIES
from vit.config.composition import known_keys
from vit.config.config import Config, EvaluateConfig, from_composed
from vit.data.datasets import DATASETS
from vit.data.test_sets import TEST_SETS
from vit.evaluation.measurements import MEASUREMENTS
from vit.training.optimizers import OPTIMIZERS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("benchmarks", "data", "outputs")]
# Its commands need its code; tests/test_extend.py runs them
COMMAND_PAGES = [page for page in PAGES if page.name != "extend.md"]

LINK = re.compile(r"\]\(([^)\s]+)\)")
BASH = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What makes no difference to whether a configuration is accepted, or is given to another program
NOT_COMPOSED = ("hydra/launcher", "hydra.launcher", "hydra.run.dir", "hydra.sweep.dir", "search=")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands_in(page: Path) -> list[str]:
    """The lines of the page's bash blocks, with continued lines put together."""
    blocks = BASH.findall(page.read_text(encoding="utf-8"))
    return "".join(blocks).replace("\\\n", " ").splitlines()


def all_commands(start: str) -> list[str]:
    """Every command of the pages that begins like this, without what follows the start."""
    lines = [line for page in COMMAND_PAGES for line in commands_in(page)]
    found = sorted({line.partition(start)[2] for line in lines if start in line})
    assert found, start
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if heading:
            assert heading in anchors_of(target), link


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


def test_the_readme_is_a_front_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text, f"no link to {page.name}"


def accepted(name: str, words: list[str]) -> None:
    """Compose a command's configuration, and check it as train.py does."""
    overrides = [word for word in words if not word.startswith(NOT_COMPOSED)]
    config = from_composed(composed(*overrides, name=name))
    if name == "train" and config.resume is None:
        check(config)


@pytest.mark.parametrize("arguments", all_commands("train.py "))
def test_commands_of_train_are_accepted(arguments):
    words = shlex.split(arguments, comments=True)
    # Files of the reader's own are not there
    if "--help" in words or any(word.startswith("--config-dir=") for word in words):
        return
    is_sweep = "-m" in words
    overrides = [word for word in words if "=" in word]
    if is_sweep:
        # The first of every list of values
        overrides = [word.split(",")[0] for word in overrides]
    accepted("train", overrides)


@pytest.mark.parametrize("arguments", all_commands("evaluate.py "))
def test_commands_of_evaluate_are_accepted(arguments):
    accepted("evaluate", shlex.split(arguments, comments=True))


@pytest.mark.parametrize("arguments", all_commands("python -m vit."))
def test_options_of_commands_exist(arguments):
    module, *words = shlex.split(arguments, comments=True)
    source = (ROOT / "vit" / f"{module}.py").read_text(encoding="utf-8")
    for option in [word for word in words if word.startswith("--")]:
        assert f'"{option}"' in source, option


@pytest.mark.parametrize("target", all_commands("make "))
def test_targets_of_make_exist(target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{shlex.split(target, comments=True)[0]}:", makefile, re.MULTILINE)


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# `data` and `model` of evaluate.py hold further keys, and groups are not keys
@pytest.mark.parametrize(
    ("page", "config"), [("configure.md", Config), ("evaluate.md", EvaluateConfig)]
)
def test_every_key_is_explained(page, config):
    text = text_of(page)
    assert [key for key in known_keys(config) if f"`{key}`" not in text] == []


def test_every_choice_of_a_table_is_explained():
    text = text_of("configure.md")
    assert [name for name in (*POLICIES, *OPTIMIZERS) if f"`{name}`" not in text] == []
    text = text_of("evaluate.md")
    assert [name for name in MEASUREMENTS if f"`{name}`" not in text] == []
    data = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert [name for name in (*DATASETS, *TEST_SETS) if f"`{name}`" not in data] == []


def test_every_recipe_is_in_the_table_of_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {name.removesuffix("_384") for name in files_of("experiment")}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_every_option_of_a_command_is_explained():
    pages = ("look_inside", "train_on_your_images", "scale_up", "weights")
    texts = [(ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in pages]
    text = "\n".join(texts)
    for path in sorted((ROOT / "vit").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for option in re.findall(r'add_argument\(\s*"(--[\w-]+)"', source):
            assert f"`{option}`" in text, f"{path.name} {option}"
