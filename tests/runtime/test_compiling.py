"""Whether the model is compiled, and what is said where it can't be."""

import inspect

import pytest
import torch
from small_training import MadeUpBatches, batch, make_model, make_state, make_trainer
from torch import nn
from torch._inductor.exc import InductorError

from vit.errors import ConfigError
from vit.model.positions import rope2d
from vit.model.vision_transformer import Attention
from vit.runtime.compiling import compile_model, missing_compiler, worth_compiling
from vit.runtime.precision import Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = Precision("bf16", CPU), Precision("fp32", CPU)


@pytest.mark.parametrize(
    ("precision", "width", "run_flops", "worth"),
    [
        (BF16, 384, 1e16, True),
        (BF16, 192, 1e16, True),
        (BF16, 128, 1e16, False),
        (BF16, 384, 1e13, False),
        (FP32, 768, 1e20, False),
        (Precision("bf16", CUDA), 192, 1e17, True),
        (Precision("fp32", CUDA), 192, 1e17, True),
        (Precision("bf16", CUDA), 192, 1e13, False),
        (Precision("fp32", torch.device("mps")), 768, 1e20, False),
    ],
)
def test_auto_decides_by_device_precision_width_and_length(precision, width, run_flops, worth):
    assert worth_compiling(precision, width, run_flops) == worth


def test_the_model_is_compiled_where_that_is_asked_for_or_pays():
    model = nn.Linear(2, 2)
    assert compile_model(model, "auto", BF16, 128, 1e16) == (model, False, None)
    # 0 is false to other keys too
    for mode in (False, 0):
        assert compile_model(model, mode, BF16, 768, 1e20) == (model, False, None)
    for mode, precision, width, run_flops in ((True, FP32, 2, 1.0), ("auto", BF16, 384, 1e16)):
        compiled = compile_model(model, mode, precision, width, run_flops)
        assert compiled.forward is not model
        assert compiled.is_compiled


def test_without_a_compiler_the_model_runs_uncompiled_and_says_so(monkeypatch):
    model = nn.Linear(2, 2)
    monkeypatch.setattr("vit.runtime.compiling.shutil.which", lambda name: None)
    monkeypatch.setattr("vit.runtime.compiling.has_triton", lambda: False)
    forward, is_compiled, message = compile_model(model, True, FP32, 768, 1e20)
    assert forward is model
    assert not is_compiled
    assert message.startswith("runtime.compile: ")
    assert "C++" in missing_compiler(CPU)
    assert "Triton" in missing_compiler(CUDA)


def test_where_a_trial_fails_the_model_runs_uncompiled_and_says_why(monkeypatch):
    """As where the compiled kernels may not be loaded, or Triton finds no C compiler."""
    compile_for_real = torch.compile

    def failing(graph, inputs):
        error = OSError("x.so: failed to map segment from shared object\nmore")
        raise InductorError(error, inspect.currentframe())

    def compile_failing(function, **options):
        return compile_for_real(function, backend=failing, **options)

    monkeypatch.setattr("torch.compile", compile_failing)
    monkeypatch.setattr("vit.runtime.compiling.shutil.which", lambda name: "/bin/true")
    model = nn.Linear(2, 2)
    forward, is_compiled, message = compile_model(model, True, FP32, 768, 1e20)
    assert forward is model
    assert not is_compiled
    assert "failed to map segment from shared object" in message
    assert "\n" not in message


class Graphs:
    """Stands in for torch's compiler: counts the graphs, and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def batch_sizes(self):
        """Of the images, or of their tokens, that each graph is for."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        inputs = [node for node in nodes if node.name in ("l_images_", "l_x_")]
        return [node.meta["example_value"].shape[0] for node in inputs]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes from now on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counted = Graphs()
    compile_for_real = torch.compile

    def compile_counted(model, *, mode=None, **options):
        return compile_for_real(model, backend=counted, fullgraph=True, **options)

    monkeypatch.setattr("torch.compile", compile_counted)
    # The trial has a graph of its own
    monkeypatch.setattr("vit.runtime.compiling.compiling_error", lambda device: None)
    yield counted
    torch._dynamo.reset()


def train(folder, mode, micro_batch_size, validation=True):
    """A run of six steps with two evaluations by the model that is trained, and what it logged."""
    evaluated = []

    class Evaluating(MadeUpBatches):
        def evaluate(self, model, *others):
            model.eval()
            images, _ = batch(100, size=12)
            with torch.no_grad():
                evaluated.append(model(images).mean().item())
            return super().evaluate(model, *others)

    evaluations = [{"loss": 1.0, "top1": 0.5}, {"loss": 0.5, "top1": 0.6}] if validation else None
    state = make_state(make_model(drop_path=0.3, dropout=0.2))
    trainer = make_trainer(
        folder,
        state=state,
        batches=Evaluating(evaluations=evaluations),
        micro_batch_size=micro_batch_size,
    )
    model = compile_model(state.model, mode, FP32, 16, 1.0)
    trainer.step.forward = model.forward
    trainer.fit()
    return (folder / "metrics.jsonl").read_text(), evaluated


@pytest.mark.parametrize(
    ("mode", "micro_batch_size", "sizes"),
    [
        # One graph over training and evaluation
        (True, None, [16]),
        # A divisor: no other
        (True, 8, [8]),
        # A rest has a graph of its own, of fixed sizes too
        (True, 6, [6, 4]),
        # Of a block, and of the last one, which computes the class token alone
        ("blocks", None, [16, 16]),
        ("blocks", 6, [6, 6, 4, 4]),
    ],
)
def test_there_is_a_graph_for_each_shape(tmp_path, graphs, mode, micro_batch_size, sizes):
    compiled = train(tmp_path / "compiled", mode, micro_batch_size)
    assert graphs.batch_sizes() == sizes
    assert len(graphs.graphs) == len(sizes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(sizes)
    # The graphs run the kernels they were made from, with the masks of the seed and the step
    assert compiled == train(tmp_path / "plain", False, micro_batch_size)


def test_cuda_graphs_are_asked_for_and_each_step_is_marked(tmp_path, graphs, monkeypatch):
    """As far as a machine without a GPU can tell."""
    modes, marks = [], []
    compile_counted = torch.compile

    def compile_noting_modes(model, **options):
        modes.append((options["mode"], options["dynamic"]))
        return compile_counted(model, **options)

    monkeypatch.setattr("torch.compile", compile_noting_modes)
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr("vit.runtime.compiling.missing_compiler", lambda device: None)
    state = make_state(make_model(drop_path=0.3, dropout=0.2))
    compiled = compile_model(state.model, "graphs", Precision("bf16", CUDA), 16, 1.0)
    assert compiled.is_compiled
    assert modes == [("reduce-overhead", False)]

    trainer = make_trainer(tmp_path / "graphs", state=state)
    trainer.step.forward = compiled.forward
    trainer.fit()
    assert len(marks) == 6
    assert len(graphs.graphs) == 1
    expected, _ = train(tmp_path / "plain", False, None, validation=False)
    assert (tmp_path / "graphs" / "metrics.jsonl").read_text() == expected


def test_cuda_graphs_need_a_gpu():
    with pytest.raises(ConfigError, match=r"^runtime\.compile=graphs .*cpu.*runtime\.compile=true"):
        compile_model(nn.Linear(2, 2), "graphs", FP32, 768, 1e20)


@pytest.mark.parametrize(
    "settings",
    [
        {"drop_path": 0.3},
        {"dropout": 0.1, "attention_dropout": 0.1, "layer_scale": 0.1, "qk_norm": True},
        {"position": "rope2d", "cls_token": False, "global_pool": "mean"},
        {"position": "sincos2d", "num_registers": 2, "patch_dropout": 0.5},
        {"representation_size": 8},
    ],
    ids=str,
)
def test_one_graph_holds_the_whole_pass_on_one_device(graphs, settings):
    """A tensor of the CPU in it, or a changed input, would keep torch from replaying it."""
    meta = torch.device("meta")
    model = make_model(**settings).to(meta).train()
    keep = torch.ones(4, 2, 2, device=meta)
    compiled = compile_model(model, True, FP32, 16, 1.0)
    compiled.forward(torch.zeros(4, 3, 8, 8, device=meta), keep)
    (graph,) = graphs.graphs
    # Those of a function with its own derivative are graphs within it, not values
    parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    nodes = [node for part in parts for node in part.graph.nodes]
    values = [node.meta.get("example_value") for node in nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert tensors
    assert {tensor.device for tensor in tensors} == {meta}
    called = [str(node.target) for node in nodes if node.op == "call_method"]
    assert not [name for name in called if name.endswith("_")]


@pytest.mark.skipif(missing_compiler(CPU) is not None, reason="there is no compiler")
@pytest.mark.parametrize(("width", "heads", "side"), [(16, 1, 4), (48, 3, 5)])
def test_compiled_attention_has_the_gradients_of_the_uncompiled_one(width, heads, side):
    attention = Attention(width, heads)
    x, target = torch.randn(2, 8, side**2, width)
    x.requires_grad_()
    rotation = rope2d((side, side), width // heads, num_prefix=0)

    def results(module):
        y = module(x, rotation)
        return [y, *torch.autograd.grad((y * target).sum(), [x, *attention.parameters()])]

    compiled = torch.compile(attention, dynamic=False)
    for ours, expected in zip(results(compiled), results(attention), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
