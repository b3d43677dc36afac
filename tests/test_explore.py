"""python -m vit.explore: the page's numbers against the model's, its use in a browser, mistakes."""

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
from vit.explore import choose_count, choose_layers, main
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
NUM_PATCHES = 6
# A name that would end a script element, and one that means something to a template
CLASSES = ["cat", "</script><b>$& dog {blobs}", "bird"]
MODELS = [
    {},
    {"num_registers": 2, "pruned_heads": {"1": [0, 2]}},
    {"global_pool": "mean", "cls_token": False, "position": "rope2d"},
    {"global_pool": "mean", "num_registers": 1, "num_channels": 1},
    {"global_pool": "cls_mean"},
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def write(
    path: Path, seed: int = 0, kind: str = "best", step: int | None = 100, **changes
) -> VisionTransformer:
    """Write a checkpoint with random weights and return its model."""
    torch.manual_seed(seed)
    config = {**SMALL, **changes}
    model = build_model(config, len(CLASSES)).eval()
    tensors = model.state_dict()
    if kind == "last":
        # The averaged weights are the model's; the others must not be used
        averaged = {f"average/{name}": tensor for name, tensor in tensors.items()}
        zeros = {f"model/{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
        tensors = {**averaged, **zeros}
    channels = config.get("num_channels", 3)
    model.preprocessing = Preprocessing((16, 24), channels, (0.5,), (0.25,), None, "bilinear")
    header = {
        "kind": kind,
        "config": {"model": config},
        "classes": CLASSES,
        "preprocessing": model.preprocessing.to_dict(),
    }
    if step is not None:
        header["progress"] = {"step": step}
    write_checkpoint(path, tensors, header)
    return model


def explore(*arguments) -> int:
    return run_command("vit.explore", lambda: main([str(argument) for argument in arguments]))


def stored(page: str, name: str, dtype: str) -> np.ndarray:
    """The numbers in a script element of the page."""
    text = re.search(f'<script type="text/plain" id="{name}">(.*?)</script>', page)
    return np.frombuffer(base64.b64decode(text[1]), dtype=dtype)


def described(page: str) -> dict:
    text = re.search('<script type="application/json" id="about">(.*?)</script>', page)
    return json.loads(text[1])


def stored_maps(page: str, name: str, tokens: int) -> torch.Tensor:
    """The attention maps (M, N, N), from their quantized square roots as the page reads them."""
    roots = torch.from_numpy(stored(page, name, "uint8").astype(np.float32))
    squares = roots.reshape(-1, tokens, tokens) ** 2
    return squares / squares.sum(dim=-1, keepdim=True)


@pytest.fixture
def images(tmp_path) -> Path:
    """Three images: a.png, whose folder is no class, test/bird/0.jpg and test/cat/0.jpg."""
    root = make_images(tmp_path / "images", {"test": 1}, ("bird", "cat"))
    Image.effect_noise((30, 20), 80).save(root / "a.png")
    return root


def expected_maps(trace) -> torch.Tensor:
    """For each layer its heads' maps and the rollout up to it."""
    maps = []
    for layer, attention in enumerate(trace.attentions):
        maps += [attention[0], rollout(trace.attentions[: layer + 1])]
    return torch.cat(maps)


def expected_probabilities(model, image: torch.Tensor) -> torch.Tensor:
    """Of the whole model, then with each head off, by a mask in a forward pass of its own."""
    logits = [model.trace(image).logits]
    for layer, block in enumerate(model.encoder.blocks):
        for head in block.attention.heads:
            mask = torch.ones(3, 4)
            mask[layer, head] = 0
            logits.append(model.trace(image, mask).logits)
    return torch.cat(logits).softmax(dim=1)


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_the_page_holds_what_trace_gives(changes, tmp_path, images, capsys):
    model = write(tmp_path / "best.safetensors", **changes)
    out = tmp_path / "new" / "page.html"
    assert explore(tmp_path / "best.safetensors", "--out", out, images) == 0
    assert "page.html: 3 images, 0.0 MB" in capsys.readouterr().out

    page = out.read_text("utf-8")
    about = described(page)
    assert about["classes"] == CLASSES
    assert about["grid"] == [2, 3]
    assert about["size"] == [16, 24]
    assert about["layers"] == [0, 1, 2]
    assert about["images"] == [
        {"name": "a.png", "label": None},
        {"name": "0.jpg", "label": 2},
        {"name": "0.jpg", "label": 0},
    ]
    num_prefix = model.embeddings.num_prefix
    assert len(about["prefix"]) == num_prefix
    # As the maps of vit.attention and of the report, which pooled_row() gives
    assert about["classToken"] == model.global_pool.startswith("cls")
    file = f"{tmp_path.parent.name}/{tmp_path.name}/best.safetensors"
    heads = [block.attention.heads for block in model.encoder.blocks]
    assert about["snapshots"] == [{"file": file, "step": 100, "heads": heads}]

    for number, name in enumerate(("a.png", "test/bird/0.jpg", "test/cat/0.jpg")):
        image = model.preprocessing(images / name)[None]
        with torch.no_grad():
            maps = expected_maps(model.trace(image))
            probabilities = expected_probabilities(model, image)
        result = stored_maps(page, f"maps-0-{number}", num_prefix + NUM_PATCHES)
        torch.testing.assert_close(result, maps, atol=0.006, rtol=0.02)
        torch.testing.assert_close(result.sum(dim=-1), torch.ones(result.shape[:-1]))

        result = torch.from_numpy(stored(page, f"chances-0-{number}", "<f4").copy()).reshape(-1, 3)
        torch.testing.assert_close(result, probabilities, atol=1e-5, rtol=1e-4)
        assert (result[1:] - result[0]).abs().max() > 0.01

        pixels = stored(page, f"picture-{number}", "uint8").reshape(16, 24, 3)
        shown = (model.preprocessing.denormalize(image)[0].permute(1, 2, 0) * 255).round().numpy()
        assert np.abs(pixels - shown).max() <= 1


def test_the_page_refers_to_nothing_outside(tmp_path, images):
    write(tmp_path / "best.safetensors")
    assert explore(tmp_path / "best.safetensors", images, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    without_numbers = re.sub(r'">[A-Za-z0-9+/=]+</script>', "", page)  # base64 may spell anything
    references = r"https?:|//[a-z]|\b(src|href)\s*=|@import|url\(|fetch\(|import\(|XMLHttp"
    assert not re.search(references, without_numbers)
    assert "default-src 'none'" in page


def test_test_images_of_the_data_set(digits_run, tmp_path):
    best = digits_run[0] / "checkpoints" / "best.safetensors"
    last = best.with_name("last.safetensors")
    options = ("--also", last, "--limit", 5, "--layers", 1)
    assert explore(best, "--out", tmp_path / "page.html", *options) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    about = described(page)
    assert len({image["label"] for image in about["images"]}) == 5
    assert all(re.fullmatch(r"digits.*, number \d+", image["name"]) for image in about["images"])
    assert about["layers"] == [1]
    assert about["depth"] == 2
    num_heads = len(about["snapshots"][0]["heads"][0])
    assert len(stored(page, "chances-0-4", "<f4")) == (1 + num_heads) * 10
    assert (tmp_path / "page.html").stat().st_size < 1e6
    # These are preprocessed like the test split, so the predictions are mostly right
    correct = [
        stored(page, f"chances-0-{number}", "<f4")[:10].argmax() == image["label"]
        for number, image in enumerate(about["images"])
    ]
    assert sum(correct) >= 3


def test_checkpoints_are_sorted_by_step_and_shown_once(tmp_path, images, capsys):
    write(tmp_path / "best.safetensors", step=300)
    write(tmp_path / "last.safetensors", step=300, kind="last")
    write(tmp_path / "previous.safetensors", seed=1, step=200, kind="last")
    pruned = write(tmp_path / "pruned.safetensors", seed=2, step=400, pruned_heads={"0": [1]})
    also = (tmp_path / f"{name}.safetensors" for name in ("pruned", "last", "previous"))
    out = tmp_path / "page.html"
    assert explore(tmp_path / "best.safetensors", images, "--out", out, "--also", *also) == 0
    printed = capsys.readouterr().out
    assert re.search(r"last.safetensors: left out, .*best.safetensors", printed)
    assert "3 images, 3 checkpoints" in printed

    page = out.read_text("utf-8")
    snapshots = described(page)["snapshots"]
    assert [snapshot["step"] for snapshot in snapshots] == [200, 300, 400]
    heads = [snapshot["heads"][0] for snapshot in snapshots]
    assert heads == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3]]
    image = pruned.preprocessing(images / "a.png")[None]
    with torch.no_grad():
        expected = pruned(image).softmax(dim=1)[0]
    np.testing.assert_allclose(stored(page, "chances-2-0", "<f4")[:3], expected, atol=1e-5)


def test_kernels_of_attention_are_settled_before_heads_are_switched_off(
    tmp_path, images, monkeypatch
):
    settled = []
    monkeypatch.setattr(
        "vit.report.explorer.exclude_faulty_attention",
        lambda device, model: settled.append(model.classes),
    )
    write(tmp_path / "best.safetensors")
    assert explore(tmp_path / "best.safetensors", images, "--out", tmp_path / "page.html") == 0
    assert settled == [CLASSES]


def test_large_models_get_fewer_images_or_an_error():
    assert choose_count(None, int(0.3e6), 1) == 8
    assert choose_count(None, int(8e6), 1) == 3
    assert choose_count(None, int(50e6), 1) == 1
    assert choose_count(20, int(0.3e6), 1) == 20
    with pytest.raises(ConfigError, match=r"96 MB.* --limit 7 or fewer --also"):
        choose_count(12, int(8e6), 2)
    with pytest.raises(ConfigError, match=r"69\.0 MB; give fewer --layers$"):
        choose_count(None, int(69e6), 1)


def test_layers_are_sorted_and_must_exist():
    assert choose_layers(None, 3) == [0, 1, 2]
    assert choose_layers([2, 0, 2], 3) == [0, 2]
    for layers in ([3], [-1], [0, 5]):
        with pytest.raises(ConfigError, match="--layers"):
            choose_layers(layers, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("best.safetensors empty", "empty: "),
        ("best.safetensors *.jpg", "*.jpg: "),
        ("best.safetensors text.jpg", "text.jpg: "),
        ("best.safetensors good.png --limit 0", "--limit "),
        ("best.safetensors good.png --layers 0 3", "--layers 0 3: "),
        ("best.safetensors good.png --data-root empty", "--data-root does nothing "),
        ("best.safetensors good.png --out text.jpg/page.html", "--out text.jpg/page.html: "),
        ("best.safetensors good.png --out /proc/nowhere.html", "--out /proc/nowhere.html: "),
        ("best.safetensors good.png --out empty", "--out empty: "),
        ("best.safetensors good.png --out best.safetensors", "--out best.safetensors: "),
        ("nowhere.safetensors good.png", "nowhere.safetensors: "),
        ("best.safetensors good.png --also text.jpg", "text.jpg: "),
        (
            "best.safetensors good.png --also other.safetensors",
            "other.safetensors: of another model than best.safetensors (layers: 2 ",
        ),
        ("best.safetensors good.png --also timeless.safetensors", "timeless.safetensors: "),
        # Test images need the data set, which only a best checkpoint describes
        ("last.safetensors", "last.safetensors: "),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(Path("best.safetensors"))
    write(Path("other.safetensors"), num_layers=2)
    write(Path("timeless.safetensors"), step=None)
    write(Path("last.safetensors"), kind="last")
    Path("empty").mkdir()
    Path("text.jpg").write_text("not an image")
    Image.new("RGB", (8, 8)).save("good.png")
    before = set(tmp_path.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "page.html"]
    assert explore(*arguments.split(), *out) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"vit.explore: {message}")
    assert errors.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before  # nothing half written


# Inserted before the page's own script: collects its errors, and replaces frames, of which a
# browser that only dumps the page has none
LISTEN = """<script>
window.faults = [];
addEventListener("error", event => faults.push(event.message));
addEventListener("securitypolicyviolation", event => faults.push(event.blockedURI));
window.requestAnimationFrame = draw => setTimeout(draw, 16);
</script>"""

# Inserted after it: does what a person would do, and notes what the page then shows
ACT = """<script>
const results = {};
const frame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
async function note(name) {
  await frame();
  const chosen = document.querySelector("#atlas [aria-pressed=true]");
  results[name] = {
    row: [...attention(state.layer, state.head, shownToken())],
    caption: byId("caption").textContent,
    prediction: byId("prediction").textContent,
    bars: [...document.querySelectorAll(".bar")].map(bar => bar.textContent),
    off: byId("off-name").textContent,
    disabled: byId("off").disabled,
    checkpoint: byId("checkpoint-name").textContent,
    chosen: chosen.getAttribute("aria-label"),
    focus: document.activeElement.getAttribute("aria-label"),
  };
}
function pointer(row, column, kind) {
  const box = byId("image").getBoundingClientRect();
  byId("image").dispatchEvent(new PointerEvent(kind, {
    bubbles: true,
    pointerType: "mouse",
    clientX: box.left + (column + 0.5) * box.width / columns,
    clientY: box.top + (row + 0.5) * box.height / rows,
  }));
}
function press(target, key) {
  target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
}
function set(id, value) {
  byId(id).value = value;
  const kind = byId(id).tagName === "SELECT" ? "change" : "input";
  byId(id).dispatchEvent(new Event(kind, {bubbles: true}));
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
  byId("off").click();
  await note("off");
  document.querySelectorAll("#images input")[1].click();
  await note("image");
  pointer(0, 1, "click");
  press(byId("image"), "ArrowRight");
  await note("keys");
  set("head", ROLLOUT);
  await note("rollout");
  press(byId("image"), "Escape");
  const cell = document.querySelector('#atlas [data-layer="0"][data-head="3"]');
  cell.focus();
  press(cell, "ArrowRight");
  await note("atlas");
  byId("off").click();
  await note("deep");
  if (about.prefix.length > 1) byId("tokens").lastElementChild.click();
  await note("register");
  if (about.snapshots.length > 1) set("checkpoint", 0);
  await note("checkpoint");
  const {width, height} = byId("image");
  const painted = byId("image").getContext("2d").getImageData(0, 0, width, height).data;
  const output = document.createElement("output");
  output.id = "results";
  output.textContent = JSON.stringify({
    results,
    faults,
    colors: new Set(painted).size,
    overflow: document.documentElement.scrollWidth - innerWidth,
    bold: document.querySelectorAll("#bars b, #images b").length,
  });
  document.body.append(output);
})();
</script>"""


def act_in_browser(page: Path, size: str) -> dict:
    """Do what ACT says to the page in a headless browser; return what it noted."""
    text = page.read_text("utf-8")
    text = text.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{ACT}</body>")
    acted = page.with_name("acted.html")
    acted.write_text(text, "utf-8")
    command = [
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
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    output = re.search('<output id="results">(.*?)</output>', done.stdout, re.S)
    assert output, done.stderr[-3000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-3000:]
    return json.loads(html.unescape(output[1]))


def assert_predicts(shown: dict, model, image: torch.Tensor, mask: torch.Tensor) -> None:
    """The page shows the model's prediction, and the bars in the order of the probabilities."""
    with torch.no_grad():
        probabilities = model.trace(image, mask).logits.softmax(dim=1)[0]
    assert CLASSES[int(probabilities.argmax())] in shown["prediction"]
    labels = probabilities.argsort(descending=True).tolist()
    for bar, label in zip(shown["bars"], labels, strict=True):
        assert bar.startswith(CLASSES[label])
        number = re.search(r"(?:✓)?(?:< )?([\d.]+) %", bar.removeprefix(CLASSES[label]))
        assert abs(float(number[1]) - 100 * probabilities[label]) < 0.06


def assert_row(shown: dict, expected: torch.Tensor) -> None:
    """The page shows this row of attention, up to its quantization."""
    row = torch.tensor(shown["row"])
    torch.testing.assert_close(row, expected, atol=0.006, rtol=0.02)


def assert_pooled(shown: dict, matrix: torch.Tensor, model) -> None:
    """The page shows what the pooled output reads of the patches."""
    row = torch.tensor(shown["row"][model.embeddings.num_prefix :])
    expected = pooled_row(matrix, model).flatten()
    torch.testing.assert_close(row, expected, atol=0.006, rtol=0.02)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome found")
@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, "1200,900"),
        ({"global_pool": "cls_mean"}, "1200,900"),
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
    ids=["cls", "cls_mean", "mean"],
)
def test_a_person_explores_the_page(changes, size, tmp_path, images):
    model = write(tmp_path / "best.safetensors", **changes)
    other = write(tmp_path / "previous.safetensors", seed=5, step=50, kind="last", **changes)
    folders = (images / "test" / "bird", images / "test" / "cat")
    page = tmp_path / "page.html"
    also = tmp_path / "previous.safetensors"
    assert explore(tmp_path / "best.safetensors", *folders, "--out", page, "--also", also) == 0

    noted = act_in_browser(page, size)
    assert noted["faults"] == []
    assert noted["bold"] == 0  # a class's name is not markup
    assert noted["overflow"] <= 0
    assert noted["colors"] > 20

    results = noted["results"]
    num_prefix = model.embeddings.num_prefix
    bird, cat = (model.preprocessing(folder / "0.jpg")[None] for folder in folders)
    with torch.no_grad():
        bird_attentions = model.trace(bird).attentions
        cat_attentions = model.trace(cat).attentions
    all_heads = torch.ones(3, 4)
    one_off = torch.ones(3, 4)
    one_off[0, 3] = 0

    start = results["start"]
    pooled_name = "Class token" if model.global_pool.startswith("cls") else "Mean of all patches"
    assert start["caption"].startswith(f"{pooled_name}, layer 2, the mean of the heads: ")
    assert start["checkpoint"].startswith("step 100 (")
    assert start["disabled"]
    assert_pooled(start, bird_attentions[2][0].mean(dim=0), model)
    assert_predicts(start, model, bird, all_heads)

    hover = results["hover"]
    assert hover["caption"].startswith("Patch in row 2, column 3, layer 2")
    assert_row(hover, bird_attentions[2][0, :, num_prefix + 5].mean(dim=0))
    assert results["left"]["row"] == start["row"]

    head = results["head"]
    assert head["off"] == "Switch head 3 of layer 0 off"
    assert not head["disabled"]
    assert_pooled(head, bird_attentions[0][0, 3], model)
    assert_predicts(head, model, bird, all_heads)
    assert results["off"]["prediction"].startswith("Without head 3 of layer 0: ")
    assert_predicts(results["off"], model, bird, one_off)

    # The other image, with the same head still off
    assert_predicts(results["image"], model, cat, one_off)
    assert_pooled(results["image"], cat_attentions[0][0, 3], model)
    assert_row(results["keys"], cat_attentions[0][0, 3, num_prefix + 2])
    assert results["rollout"]["disabled"]
    assert_row(results["rollout"], rollout(cat_attentions[:1])[0, num_prefix + 2])
    assert_predicts(results["rollout"], model, cat, all_heads)

    # From head 3 of layer 0 to the right, over layer 1 where it may have been removed
    layer = 2 if "pruned_heads" in changes else 1
    index = model.encoder.blocks[layer].attention.heads.index(3)
    atlas = results["atlas"]
    assert atlas["chosen"].startswith(f"layer {layer}, head 3; without it ")
    assert atlas["focus"] == atlas["chosen"]
    assert_pooled(atlas, cat_attentions[layer][0, index], model)
    assert_predicts(atlas, model, cat, all_heads)
    one_off = torch.ones(3, 4)
    one_off[layer, 3] = 0
    assert_predicts(results["deep"], model, cat, one_off)

    # The checkpoint before
    assert results["checkpoint"]["checkpoint"].startswith("step 50 (")
    with torch.no_grad():
        earlier = other.trace(cat).attentions[layer][0, index]
    if num_prefix > 1:
        assert_row(results["register"], cat_attentions[layer][0, index, 1])
        assert_row(results["checkpoint"], earlier[1])
    else:
        assert_pooled(results["checkpoint"], earlier, other)
