"""The explorer: its numbers against the model, its page in a real browser, its command's mistakes."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_images
from PIL import Image

from vit.checkpoints.file import write_checkpoint
from vit.checkpoints.model import build_model
from vit.data.preprocessing import Preprocessing
from vit.errors import ConfigError, run_command
from vit.explore import (
    choose_count,
    examples_of_files,
    load_snapshots,
    main,
    page,
    page_bytes,
    quantise,
)
from vit.model.attention_maps import pooled_row, rollout
from vit.model.vision_transformer import VisionTransformer

SMALL = {
    "image_size": (16, 24),
    "patch_size": 8,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "init": "trunc_normal",
    "init_range": 0.3,
}
CLASSES = ["cat", "</script><b>$& dog {blobs}", "bird"]
MODELS = [
    {},
    {"num_registers": 2, "pruned_heads": {"1": [0, 2]}},
    {"global_pool": "mean", "cls_token": False, "position": "rope2d"},
    {"global_pool": "mean", "num_registers": 1, "num_channels": 1},
]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


def write(
    path: Path, seed: int = 0, kind: str = "best", step: int | None = 100, **changes
) -> VisionTransformer:
    """A checkpoint with random weights at path, and its model."""
    torch.manual_seed(seed)
    config = {**SMALL, **changes}
    model = build_model(config, len(CLASSES)).eval()
    tensors = model.state_dict()
    if kind == "last":
        tensors = {
            **{f"average/{name}": tensor for name, tensor in tensors.items()},
            **{f"model/{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()},
        }
    channels = config.get("num_channels", 3)
    preprocessing = Preprocessing((16, 24), channels, (0.5,), (0.25,), None, "bilinear")
    header = {
        "kind": kind,
        "config": {"model": config},
        "classes": CLASSES,
        "preprocessing": preprocessing.to_dict(),
    }
    write_checkpoint(
        path, tensors, header if step is None else {**header, "progress": {"step": step}}
    )
    model.preprocessing = preprocessing
    return model


def command(*arguments) -> int:
    return run_command("vit.explore", lambda: main([str(argument) for argument in arguments]))


def stored(page: str, name: str, dtype: str) -> np.ndarray:
    text = re.search(f'<script type="text/plain" id="{name}">(.*?)</script>', page)
    return np.frombuffer(base64.b64decode(text[1]), dtype=dtype)


def described(page: str) -> dict:
    return json.loads(
        re.search('<script type="application/json" id="about">(.*?)</script>', page)[1]
    )


def shares(page: str, name: str, tokens: int) -> torch.Tensor:
    squares = (
        torch.from_numpy(stored(page, name, "uint8").astype(np.float32)).reshape(-1, tokens, tokens)
        ** 2
    )
    return squares / squares.sum(dim=-1, keepdim=True)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three pictures, of cat, bird, bird; the folder of one is no class."""
    root = make_images(tmp_path / "pictures", {"test": 1}, ("bird", "cat"))
    Image.effect_noise((30, 20), 80).save(root / "a.png")
    return root


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_quantised_rows_are_near_and_sum_to_one():
    torch.manual_seed(0)
    rows = torch.cat([(torch.randn(50, 197) * spread).softmax(dim=1) for spread in (0, 1, 4, 12)])
    squares = quantise(rows).double() ** 2
    found = squares / squares.sum(dim=1, keepdim=True)
    bound = (rows * rows.amax(dim=1, keepdim=True)).sqrt() / 255
    assert ((found - rows).abs() <= 1.5 * bound + 0.01 * rows + 1e-5).all()
    # What one token leaves for the others is still told apart
    sink = torch.tensor([[0.98, 0.0003, 0.0007, 0.019]])
    squares = quantise(sink).double() ** 2
    torch.testing.assert_close((squares / squares.sum())[0], sink[0].double(), atol=1e-4, rtol=0.1)


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_the_page_holds_what_trace_gives(changes, tmp_path, pictures, capsys):
    model = write(tmp_path / "best.safetensors", **changes)
    assert (
        command(tmp_path / "best.safetensors", "--out", tmp_path / "new" / "page.html", pictures)
        == 0
    )
    assert "page.html: 3 images, 0.0 MB" in capsys.readouterr().out
    page = (tmp_path / "new" / "page.html").read_text("utf-8")
    about, prefix = described(page), model.embeddings.num_prefix
    assert (about["classes"], about["grid"], about["size"], about["layers"]) == (
        CLASSES,
        [2, 3],
        [16, 24],
        [0, 1, 2],
    )
    assert about["images"] == [
        {"name": "a.png", "label": None},
        {"name": "0.jpg", "label": 2},
        {"name": "0.jpg", "label": 0},
    ]
    assert len(about["prefix"]) == prefix
    files = [
        pictures / "a.png",
        pictures / "test" / "bird" / "0.jpg",
        pictures / "test" / "cat" / "0.jpg",
    ]
    heads = [block.attention.heads for block in model.encoder.blocks]
    assert about["snapshots"] == [
        {
            "file": f"{tmp_path.parent.name}/{tmp_path.name}/best.safetensors",
            "step": 100,
            "heads": heads,
        }
    ]
    for number, file in enumerate(files):
        image = model.preprocessing(file)[None]
        with torch.no_grad():
            trace = model.trace(image)
            expected = torch.cat(
                [
                    torch.cat([layer[0], rollout(trace.attentions[: place + 1])])
                    for place, layer in enumerate(trace.attentions)
                ]
            )
            off = []
            for place, numbers in enumerate(heads):
                for head in numbers:
                    off.append(torch.ones(3, 4))
                    off[-1][place, head] = 0
            chances = torch.cat(
                [trace.logits, *(model.trace(image, mask).logits for mask in off)]
            ).softmax(dim=1)
        found = shares(page, f"maps-0-{number}", prefix + 6)
        torch.testing.assert_close(found, expected, atol=0.006, rtol=0.02)
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(len(expected), prefix + 6))
        told = torch.from_numpy(stored(page, f"chances-0-{number}", "<f4").copy()).reshape(-1, 3)
        torch.testing.assert_close(told, chances, atol=1e-5, rtol=1e-4)
        assert (told[1:] - told[0]).abs().max() > 0.01
        picture = stored(page, f"picture-{number}", "uint8").reshape(16, 24, 3)
        shown = (model.preprocessing.denormalize(image)[0].permute(1, 2, 0) * 255).round().numpy()
        assert np.abs(picture - shown).max() <= 1


def test_the_page_refers_to_nothing_outside(tmp_path, pictures):
    write(tmp_path / "best.safetensors")
    assert command(tmp_path / "best.safetensors", pictures, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    own = re.sub(r'">[A-Za-z0-9+/=]+</script>', "", page)  # base64 may spell anything
    assert not re.search(
        r"https?:|//[a-z]|\b(src|href)\s*=|@import|url\(|fetch\(|import\(|XMLHttp", own
    )
    assert "default-src 'none'" in page


def test_test_images_of_the_data_set(digits_run, tmp_path, capsys):
    best = digits_run[0] / "checkpoints" / "best.safetensors"
    assert (
        command(
            best,
            "--out",
            tmp_path / "page.html",
            "--also",
            best.with_name("last.safetensors"),
            "--limit",
            5,
            "--layers",
            1,
        )
        == 0
    )
    about = described(page := (tmp_path / "page.html").read_text("utf-8"))
    assert len({image["label"] for image in about["images"]}) == 5
    assert all(re.fullmatch(r"digits.*, number \d+", image["name"]) for image in about["images"])
    assert about["layers"] == [1]
    assert about["depth"] == 2
    heads = len(about["snapshots"][0]["heads"][0])
    assert len(stored(page, "chances-0-4", "<f4")) == (1 + heads) * 10
    assert (tmp_path / "page.html").stat().st_size < 1e6
    # As the test split is shown, so the answers are mostly right
    right = [
        stored(page, f"chances-0-{number}", "<f4")[:10].argmax() == image["label"]
        for number, image in enumerate(about["images"])
    ]
    assert sum(right) >= 3


def test_checkpoints_stand_in_the_order_of_their_steps_and_once(tmp_path, pictures, capsys):
    write(tmp_path / "best.safetensors", step=300)
    write(tmp_path / "last.safetensors", step=300, kind="last")
    write(tmp_path / "previous.safetensors", seed=1, step=200, kind="last")
    pruned = write(tmp_path / "pruned.safetensors", seed=2, step=400, pruned_heads={"0": [1]})
    assert (
        command(
            tmp_path / "best.safetensors",
            pictures,
            "--out",
            tmp_path / "page.html",
            "--also",
            *(tmp_path / f"{name}.safetensors" for name in ("pruned", "last", "previous")),
        )
        == 0
    )
    out = capsys.readouterr().out
    assert re.search(r"last.safetensors: left out, the same weights as .*best.safetensors", out)
    assert "3 images, 3 checkpoints" in out
    page = (tmp_path / "page.html").read_text("utf-8")
    moments = described(page)["snapshots"]
    assert [moment["step"] for moment in moments] == [200, 300, 400]
    assert [moment["heads"][0] for moment in moments] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3]]
    image = pruned.preprocessing(pictures / "a.png")[None]
    told = stored(page, "chances-2-0", "<f4")[:3]
    np.testing.assert_allclose(told, pruned(image).softmax(dim=1).detach()[0], atol=1e-5)


def test_large_models_get_fewer_images_or_a_line():
    assert choose_count(None, int(0.3e6), 1) == 8
    assert choose_count(None, int(8e6), 1) == 3
    assert choose_count(None, int(50e6), 1) == 1
    assert choose_count(20, int(0.3e6), 1) == 20
    with pytest.raises(
        ConfigError,
        match=r"96 MB, more than 60, 12 images at 8.0 MB; give --limit 7 or fewer --also",
    ):
        choose_count(12, int(8e6), 2)
    with pytest.raises(ConfigError, match=r"1 image at 69.0 MB; give fewer --layers$"):
        choose_count(None, int(69e6), 1)


def test_the_size_is_known_beforehand(tmp_path, pictures):
    write(tmp_path / "best.safetensors", num_registers=2, pruned_heads={"1": [0, 2]})
    snapshots = load_snapshots([tmp_path / "best.safetensors"])
    examples = examples_of_files([pictures / "a.png"], snapshots[0].model)
    one, two = (
        len(page(snapshots, examples * count, [0, 1, 2], torch.device("cpu"))) for count in (1, 2)
    )
    assert abs(two - one - page_bytes(snapshots, [0, 1, 2])) < 300  # their names and tags


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("best.safetensors empty", "empty: no pictures in this folder (looked for .jpg"),
        ("best.safetensors *.jpg", "*.jpg: no such file or folder"),
        ("best.safetensors text.jpg", "text.jpg: not a readable picture"),
        ("best.safetensors good.png --limit 0", "--limit must be a positive number, got 0"),
        ("best.safetensors good.png --layers 0 3", "--layers 0 3: the model has layers 0 to 2"),
        (
            "best.safetensors good.png --out text.jpg/page.html",
            "--out text.jpg/page.html: can't write there",
        ),
        (
            "best.safetensors good.png --out /proc/nowhere.html",
            "--out /proc/nowhere.html: can't write there",
        ),
        (
            "best.safetensors good.png --out empty",
            "--out empty: give the name of a file that ends in .html",
        ),
        (
            "best.safetensors good.png --out best.safetensors",
            "--out best.safetensors: give the name of a file that ends in .html",
        ),
        ("nowhere.safetensors good.png", "nowhere.safetensors: no such checkpoint file"),
        ("best.safetensors good.png --also text.jpg", "text.jpg: not a whole safetensors file"),
        (
            "best.safetensors good.png --also other.safetensors",
            "of another model than best.safetensors (layers: 2 there",
        ),
        (
            "best.safetensors good.png --also timeless.safetensors",
            "timeless.safetensors: its header tells no step",
        ),
        (
            "last.safetensors",
            "last.safetensors: holds the whole state of a run",
        ),  # for test images it takes a best one
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, given, told):
    monkeypatch.chdir(tmp_path)
    write(Path("best.safetensors"))
    write(Path("other.safetensors"), num_layers=2)
    write(Path("timeless.safetensors"), step=None)
    write(Path("last.safetensors"), kind="last")
    Path("empty").mkdir()
    Path("text.jpg").write_text("no picture")
    Image.new("RGB", (8, 8)).save("good.png")
    there = set(tmp_path.rglob("*"))
    assert command(*given.split(), *([] if "--out" in given else ["--out", "page.html"])) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert errors.count("\n") == 1
    assert set(tmp_path.rglob("*")) == there  # nothing half written


# --- in a browser ----------------------------------------------------------------------------------------------------

# Put before the page's own script: what goes wrong in it; and frames, of which a browser that only dumps the page has none.
# Put after it: a person's doings, and what the page then says.
LISTEN = """<script>window.faults = []; addEventListener("error", event => faults.push(event.message));
addEventListener("securitypolicyviolation", event => faults.push(event.blockedURI));
window.requestAnimationFrame = draw => setTimeout(draw, 16);</script>"""
ACT = """<script>
const results = {}, frame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
async function note(name) {
  await frame();
  results[name] = {row: [...attention(state.layer, state.head, query())], caption: element("caption").textContent,
    verdict: element("verdict").textContent, bars: [...document.querySelectorAll(".bar")].map(bar => bar.textContent),
    off: element("off-name").textContent, disabled: element("off").disabled, moment: element("moment-name").textContent,
    chosen: document.querySelector("#atlas [aria-pressed=true]").getAttribute("aria-label"),
    focus: document.activeElement.getAttribute("aria-label")};
}
function pointer(row, column, kind) {
  const box = element("picture").getBoundingClientRect();
  element("picture").dispatchEvent(new PointerEvent(kind, {bubbles: true, pointerType: "mouse",
    clientX: box.left + (column + 0.5) * box.width / columns, clientY: box.top + (row + 0.5) * box.height / rows}));
}
const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
function set(id, value) {
  element(id).value = value;
  element(id).dispatchEvent(new Event(element(id).tagName === "SELECT" ? "change" : "input", {bubbles: true}));
}
(async () => {
  await note("start");
  pointer(1, 2, "pointermove");
  await note("hover");
  pointer(1, 2, "pointerleave");
  await note("left");
  set("layer", 0);
  set("head", "3");
  await note("head");
  element("off").click();
  await note("off");
  document.querySelectorAll("#images input")[1].click();
  await note("image");
  pointer(0, 1, "click");
  press(element("picture"), "ArrowRight");
  await note("keys");
  set("head", ROLLOUT);
  await note("rollout");
  press(element("picture"), "Escape");
  const cell = document.querySelector('#atlas [data-layer="0"][data-head="3"]');
  cell.focus();
  press(cell, "ArrowRight");
  await note("atlas");
  element("off").click();
  await note("deep");
  if (about.prefix.length > 1) element("tokens").lastElementChild.click();
  await note("register");
  if (about.snapshots.length > 1) set("moment", 0);
  await note("moment");
  const painted = [...element("picture").getContext("2d").getImageData(0, 0, 40, 40).data];
  const output = document.createElement("output");
  output.id = "results";
  output.textContent = JSON.stringify({results, faults, colours: new Set(painted).size,
    overflow: document.documentElement.scrollWidth - innerWidth, bold: document.querySelectorAll("#bars b, #images b").length});
  document.body.append(output);
})();
</script>"""


def act_in_browser(page: Path, size: str) -> dict:
    """What a headless browser found while ACT was done to the page."""
    text = (
        page.read_text("utf-8")
        .replace("<head>", f"<head>{LISTEN}")
        .replace("</body>", f"{ACT}</body>")
    )
    (acted := page.with_name("acted.html")).write_text(text, "utf-8")
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={size}",
            f"--user-data-dir={page.parent / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            acted.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search('<output id="results">(.*?)</output>', done.stdout, re.S)
    assert found, done.stderr[-3000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-3000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome found")
@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, "1200,900"),
        (
            {
                "global_pool": "mean",
                "num_registers": 1,
                "pruned_heads": {"1": [3]},
                "num_channels": 1,
            },
            "500,800",
        ),
    ],
    ids=["cls", "mean"],
)
def test_a_person_explores_the_page(changes, size, tmp_path, pictures):
    model = write(tmp_path / "best.safetensors", **changes)
    other = write(tmp_path / "previous.safetensors", seed=5, step=50, kind="last", **changes)
    assert (
        command(
            tmp_path / "best.safetensors",
            pictures / "test" / "bird",
            pictures / "test" / "cat",
            "--out",
            tmp_path / "page.html",
            "--also",
            tmp_path / "previous.safetensors",
        )
        == 0
    )
    told = act_in_browser(tmp_path / "page.html", size)
    assert told["faults"] == []
    assert told["bold"] == 0  # a class name is no markup
    assert told["overflow"] <= 0
    assert told["colours"] > 20
    results, prefix = told["results"], model.embeddings.num_prefix
    images = [
        model.preprocessing(pictures / "test" / name / "0.jpg")[None] for name in ("bird", "cat")
    ]
    with torch.no_grad():
        traces = [model.trace(image) for image in images]

    def near(name: str, expected: torch.Tensor) -> None:
        torch.testing.assert_close(
            torch.tensor(results[name]["row"]), expected, atol=0.006, rtol=0.02
        )

    def pooled(name: str, matrix: torch.Tensor, of: VisionTransformer = model) -> None:
        torch.testing.assert_close(
            torch.tensor(results[name]["row"][prefix:]),
            pooled_row(matrix, of).flatten(),
            atol=0.006,
            rtol=0.02,
        )

    def answers(name: str, mask: torch.Tensor, image: int) -> None:
        """The bars, in order of the probabilities, and the verdict."""
        with torch.no_grad():
            chances = model.trace(images[image], mask).logits.softmax(dim=1)[0]
        assert CLASSES[int(chances.argmax())] in results[name]["verdict"]
        for bar, label in zip(
            results[name]["bars"], chances.argsort(descending=True).tolist(), strict=True
        ):
            assert bar.startswith(CLASSES[label])
            number = re.search(r"(?:✓)?(?:< )?([\d.]+) %", bar.removeprefix(CLASSES[label]))
            assert abs(float(number[1]) - 100 * chances[label]) < 0.06

    start = "Class token" if model.global_pool == "cls" else "Mean of all patches"
    pooled("start", traces[0].attentions[2][0].mean(dim=0))
    assert results["start"]["caption"].startswith(f"{start}, layer 2, the mean of the heads: ")
    assert results["start"]["disabled"]
    answers("start", torch.ones(3, 4), 0)
    near("hover", traces[0].attentions[2][0, :, prefix + 5].mean(dim=0))
    assert results["hover"]["caption"].startswith("Patch in row 2, column 3, layer 2")
    assert results["left"]["row"] == results["start"]["row"]
    pooled("head", traces[0].attentions[0][0, 3])
    assert results["head"]["off"] == "Switch head 3 of layer 0 off"
    assert not results["head"]["disabled"]
    answers("head", torch.ones(3, 4), 0)
    off = torch.ones(3, 4)
    off[0, 3] = 0
    answers("off", off, 0)
    assert results["off"]["verdict"].startswith("Without head 3 of layer 0: ")
    answers("image", off, 1)
    pooled("image", traces[1].attentions[0][0, 3])
    near("keys", traces[1].attentions[0][0, 3, prefix + 2])
    near("rollout", rollout(traces[1].attentions[:1])[0, prefix + 2])
    assert results["rollout"]["disabled"]
    answers("rollout", torch.ones(3, 4), 1)
    # From head 3 of layer 0 to the right, over layer 1 where it may have been removed
    layer = 2 if "pruned_heads" in changes else 1
    place = model.encoder.blocks[layer].attention.heads.index(3)
    pooled("atlas", traces[1].attentions[layer][0, place])
    assert results["atlas"]["chosen"].startswith(f"layer {layer}, head 3; without it ")
    assert results["atlas"]["focus"] == results["atlas"]["chosen"]
    answers("atlas", torch.ones(3, 4), 1)
    off = torch.ones(3, 4)
    off[layer, 3] = 0
    answers("deep", off, 1)
    assert results["start"]["moment"].startswith("step 100 (")
    assert results["moment"]["moment"].startswith("step 50 (")
    with torch.no_grad():
        before = other.trace(images[1]).attentions[layer][0, place]
    if model.embeddings.num_prefix > 1:
        near("register", traces[1].attentions[layer][0, place, 1])
        near("moment", before[1])
    else:
        pooled("moment", before, other)
