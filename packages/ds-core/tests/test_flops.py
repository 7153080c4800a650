"""FLOPs by hand for each kind of layer, and the profiler's attribution to modules and phases."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ds_core import FlopsProfiler, ReplicatedOwner, profile_model
from ds_core.observe.flop_report import FlopReport
from ds_core.observe.flop_rules import _grouped_product
from ds_core.testing.distributed import distributed
from ds_core.testing.models import CASES, Residual, Stack, TinyLM, Twice

LENET_BATCH = 1024


class LeNet(nn.Module):
    """The network of DeepSpeed's own profiler test."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(16, 120, 5), nn.Tanh()),
        )
        self.classifier = nn.Sequential(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10))

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.classifier(torch.flatten(self.features(x), 1)), dim=1)


def test_lenet_has_the_counts_of_the_papers_and_of_deepspeed() -> None:
    with torch.device("meta"):
        report = profile_model(LeNet(), torch.randn(LENET_BATCH, 1, 32, 32), backward=False)
    assert (report.params, report.macs, report.flops) == (61_706, 426_516_480, 2 * 426_516_480)
    # DeepSpeed adds the convolutions' biases, what the pools read and the softmax, and leaves out the tanhs
    # and the linear layers' biases; here all of these are element-wise operations, apart from the FLOPs.
    extra = {name: cost.elementwise for name, cost in report.operators["forward"].items()}
    assert report.flops + extra["convolution"] + extra["avg_pool2d"] + extra["_softmax"] == 866_076_672
    tanhs = 6 * 28 * 28 + 16 * 10 * 10 + 120 + 84
    assert extra["tanh"] == LENET_BATCH * tanhs
    assert extra["addmm"] == LENET_BATCH * (84 + 10)
    assert report.model.forward.elementwise == sum(extra.values())
    assert report["features.3"].forward.macs == LENET_BATCH * 10 * 10 * 16 * 6 * 25


def test_the_toy_model() -> None:
    report = profile_model(nn.Linear(10, 10), torch.randn(1, 10))
    assert (report.flops, report.macs, report.params) == (200, 100, 110)
    assert report.model.backward.flops == 200  # the weight's gradient; the input requires none


ROWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # layer, input, MACs by hand
    "linear": (lambda: nn.Linear(4, 8), (3, 5, 4), 15 * 4 * 8),
    "one vector": (lambda: nn.Linear(4, 8), (4,), 4 * 8),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9), 2 * 9 * 6 * 4 * 3),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 5), stride=2), (2, 4, 9, 11), 2 * 4 * 4 * 6 * 4 * 15),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 9), 2 * 5 * 5 * 6 * 4 * 9),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9), 2 * 7 * 7 * 6 * 2 * 9),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 9), 2 * 7 * 7 * 4 * 9),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 27 * 3 * 2 * 8),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 25 * 4 * 6 * 9),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), 2 * 25 * 4 * 3 * 9),
    "lstm": (lambda: nn.LSTM(4, 8), (3, 2, 4), 3 * 2 * 4 * 8 * (4 + 8)),
    "two-layer lstm": (lambda: nn.LSTM(4, 8, 2), (3, 2, 4), 6 * 32 * (12 + 16)),
    "gru": (lambda: nn.GRU(4, 8), (3, 2, 4), 3 * 2 * 3 * 8 * (4 + 8)),
    "rnn": (lambda: nn.RNN(4, 8), (3, 2, 4), 3 * 2 * 8 * (4 + 8)),
    "norm": (lambda: nn.LayerNorm(4), (3, 4), 0),
    "pool": (lambda: nn.MaxPool2d(2), (1, 2, 4, 4), 0),
}


@pytest.mark.parametrize("layer", ROWS)
def test_layers_by_hand(layer: str) -> None:
    build, shape, macs = ROWS[layer]
    report = profile_model(build(), torch.randn(shape, requires_grad=True))
    assert report.macs == macs
    # Each product of the forward becomes two: the input's gradient and the weight's. A recurrent network
    # starts from zeros that require no gradient, so the first step's hidden product is differentiated once.
    first = {"gru": 2 * 3 * 8 * 8, "rnn": 2 * 8 * 8}.get(layer, 0)
    assert report.model.backward.macs == 2 * macs - first
    with torch.inference_mode():  # here layers are one operator: counted by what it is made of
        assert profile_model(build().eval(), torch.randn(shape)).macs == macs


@pytest.mark.parametrize("layer", ["linear", "conv2d", "grouped", "transposed"])
def test_gradients_nobody_wants_are_not_counted(layer: str) -> None:
    build, shape, macs = ROWS[layer]
    assert profile_model(build(), torch.randn(shape)).model.backward.macs == macs  # the weight's only
    frozen = build().requires_grad_(False)
    report = profile_model(frozen, torch.randn(shape, requires_grad=True))
    assert report.model.backward.macs == macs  # the input's only


ELEMENTWISE: dict[str, tuple[nn.Module, int]] = {  # on [2, 4, 6, 6]: 288 elements
    "relu": (nn.ReLU(), 288),
    "gelu": (nn.GELU(), 288),
    "silu": (nn.SiLU(), 288),
    "tanh": (nn.Tanh(), 288),
    "softmax": (nn.Softmax(1), 288),
    "batch norm": (nn.BatchNorm2d(4, track_running_stats=False), 288),
    "group norm": (nn.GroupNorm(2, 4), 288),
    "layer norm": (nn.LayerNorm(6), 288),
    "average pool": (nn.AvgPool2d(2), 288),
    "max pool": (nn.MaxPool2d(2), 288),
    "bias": (nn.Conv2d(4, 3, 1), 2 * 3 * 36),
    "no bias": (nn.Conv2d(4, 3, 1, bias=False), 0),
    "flatten": (nn.Flatten(), 0),
    "identity": (nn.Identity(), 0),
}


@pytest.mark.parametrize("layer", ELEMENTWISE)
def test_elementwise_operations_by_hand(layer: str) -> None:
    module, count = ELEMENTWISE[layer]
    report = profile_model(module, torch.randn(2, 4, 6, 6), backward=False)
    assert report.model.forward.elementwise == count


class Attend(nn.Module):
    def __init__(self, backend: SDPBackend, causal: bool) -> None:
        super().__init__()
        self.backend, self.causal = backend, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_kernels_count_as_the_products_they_replace(causal: bool) -> None:
    heads, length, keys, width = 3, 5, 7, 8
    q = torch.randn(2, heads, length, width, requires_grad=True)
    k, v = (torch.randn(2, heads, keys, width, requires_grad=True) for _ in range(2))
    macs = 2 * heads * length * keys * width * 2
    flash = profile_model(Attend(SDPBackend.FLASH_ATTENTION, causal), q, k, v)
    plain = profile_model(Attend(SDPBackend.MATH, causal), q, k, v)
    assert flash.macs == plain.macs == macs
    assert plain.model.backward.macs == 2 * macs
    assert flash.model.backward.macs == 2 * macs + macs // 2  # the scores once more
    assert any("flash" in name for name in flash.operators["backward"])


def test_multi_head_attention_and_its_fused_inference() -> None:
    length, width = 5, 8
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, dropout=0.0)
    x = torch.randn(3, length, width)
    projections = 3 * length * 4 * width * width
    macs = projections + 3 * length * length * width * 2 + 3 * length * width * 16 * 2
    assert profile_model(layer, x, backward=False).macs == macs
    with torch.no_grad():
        assert profile_model(layer.eval(), x).macs == macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_grouped_products() -> None:
    tokens, wide, out = 6, 4, 8  # three groups
    x, w = torch.empty(tokens, wide), torch.empty(3, wide, out)
    assert _grouped_product(x, w, out=torch.empty(tokens, out)) == 2 * tokens * wide * out
    assert _grouped_product(x.T, torch.empty(tokens, out), out=w) == 2 * tokens * wide * out


# -- modules and phases --------------------------------------------------------------------------------------


def parts(report: FlopReport, phase: str) -> dict[str, int]:
    return {module.name: getattr(module, phase).flops for module in report.modules}


def test_modules_sum_up_and_the_loss_stands_outside() -> None:
    model = CASES["mlp"].build()
    batch = CASES["mlp"].make_batch(0, 1)
    with FlopsProfiler(model) as profiler:
        CASES["mlp"].losses(model, batch)[0].backward()  # type: ignore[no-untyped-call]
    report = profiler.report()
    for phase in ("forward", "backward"):
        flops = parts(report, phase)
        assert flops[""] == flops["inp"] + flops["blocks"] + flops["head"]
        assert flops["blocks"] == sum(flops[f"blocks.{i}"] for i in range(3))
        assert flops["blocks.0"] == flops["blocks.0.up"] + flops["blocks.0.down"]
    assert report["inp"].backward.flops == report["inp"].forward.flops  # x requires no gradient
    assert report["head"].backward.flops == 2 * report["head"].forward.flops
    assert report.outside["forward"].elementwise == 2 * 4  # the mean squared error over [2, 4]
    assert report.outside["backward"].elementwise == 2 * 4
    total = sum(cost.flops for costs in report.operators.values() for cost in costs.values())
    assert total == report.model.flops


def test_a_module_called_three_times() -> None:
    report = profile_model(Twice(), torch.randn(2, 6))
    shared, once = report["shared"], report["blocks.0"]
    assert (shared.runs, once.runs) == (3, 1)
    assert shared.forward.flops == 3 * once.forward.flops
    assert shared.backward.flops == 3 * once.backward.flops
    assert shared.params == once.params == sum(p.numel() for p in Residual(8, 12).parameters())


@pytest.mark.parametrize("recompute", ["reentrant", "non_reentrant"])
def test_recomputation_stands_apart(recompute: str) -> None:
    tokens = torch.randint(17, (2, 5))
    plain = profile_model(TinyLM(), tokens)
    report = profile_model(TinyLM(recompute), tokens)
    for phase in ("forward", "backward"):
        assert parts(report, phase) == parts(plain, phase)
    assert plain.model.recompute.calls == 0
    block, again = plain["blocks.0"].forward.flops, report["blocks.0"].recompute.flops
    # torch's newer checkpoint stops as soon as nothing else was saved: before the block's last product.
    last = plain["blocks.0.feed.down"].forward.flops if recompute == "non_reentrant" else 0
    assert again == block - last
    assert report["blocks"].recompute.flops == report.model.recompute.flops == 2 * again
    assert (report["blocks.0"].runs, report["blocks.0"].reruns) == (1, 1)
    assert report["head"].recompute.calls == 0


class Functional(nn.Module):
    """Checkpoints a function, not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(
            lambda x: torch.tanh(torch.tanh(x @ self.weight) @ self.weight), x, use_reentrant=False
        )
        assert isinstance(out, Tensor)
        return out


def test_a_checkpointed_function_is_recomputation_of_its_module() -> None:
    report = profile_model(nn.Sequential(Functional()), torch.randn(2, 6, requires_grad=True))
    products = 2 * 2 * 6 * 6
    assert report["0"].forward.flops == 2 * products
    assert report["0"].recompute.flops == 2 * products
    assert report["0"].backward.flops == 4 * products


def test_a_gradient_taken_inside_a_forward_is_backward() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x)[0]

    with FlopsProfiler(model := Force()) as profiler:
        model(torch.randn(2, 3))
    report = profiler.report()
    assert report["energy"].forward.flops == 2 * 2 * 9
    assert report["energy"].backward.flops == 2 * 2 * 9
    assert report.model.recompute.calls == 0


def test_compiled_code_counts_as_written_and_stays_compiled() -> None:
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            seen.append(1)
            return graph(*args)

        return run

    x = torch.randn(2, 6)
    plain = profile_model(Stack(), x)
    for name in (backend, "aot_eager"):
        model = Stack()
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend=name)  # type: ignore[call-overload]
        for warm in (True, False):  # also before anything was compiled
            if warm:
                model(x)
            report = profile_model(model, x)
            assert report.model.flops == plain.model.flops
            assert report["blocks.0"].flops == plain["blocks.0"].flops
            assert report["blocks.0._orig_mod.up"].flops == plain["blocks.0.up"].flops
    before = len(seen)
    torch._dynamo.reset()
    model = Stack()
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    assert len(seen) == before + 1
    profile_model(compiled, x)
    assert len(seen) == before + 1
    compiled(x)
    assert len(seen) == before + 2


def test_profilers_nest_and_leave_nothing() -> None:
    model = TinyLM("non_reentrant")
    tokens = torch.randint(17, (2, 5))
    with FlopsProfiler(model) as outer:
        with FlopsProfiler(model) as inner:
            model(tokens).sum().backward()
            with pytest.raises(RuntimeError, match="on already"):
                inner.__enter__()
        model(tokens).sum().backward()
    once, twice = inner.report(), outer.report()
    assert twice.model.forward.flops == 2 * once.model.forward.flops
    assert twice.model.backward.flops == 2 * once.model.backward.flops
    assert twice.model.recompute.flops == 2 * once.model.recompute.flops > 0
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert once.model.flops == inner.report().model.flops
    gone = weakref.ref(outer)
    del outer, twice
    gc.collect()
    assert gone() is None


def test_a_forward_that_raises_leaves_the_profiler_in_order() -> None:
    model = Stack()
    handle = model.blocks[1].up.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("x")))
    with FlopsProfiler(model) as profiler:
        with pytest.raises(KeyError):
            model(torch.randn(2, 6))
        handle.remove()
        torch.randn(3, 3) @ torch.randn(3, 3)
        model(torch.randn(2, 6))
    report = profiler.report()
    assert report.outside["forward"].flops == 2 * 27
    assert report["blocks.2"].runs == 1
    assert report["blocks.0"].forward.flops == 2 * report["blocks.2"].forward.flops


def test_adding_gradients_up_costs_nothing_and_profile_model_leaves_none() -> None:
    model = nn.Linear(4, 4, bias=False)
    with FlopsProfiler(model) as profiler:
        for _ in range(2):
            model(torch.randn(2, 4)).sum().backward()
    assert profiler.report().model.backward.elementwise == 0
    assert profiler.report().outside["backward"].elementwise == 0
    profile_model(model, torch.randn(2, 4))
    assert model.weight.grad is None


def test_a_hugging_face_decoder_with_grouped_heads() -> None:
    transformers = pytest.importorskip("transformers", reason="counts a model of transformers")
    width, inner, heads, groups, layers, words = 32, 48, 4, 2, 3, 100
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_hidden_layers=layers,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    rows, length = 2, 7
    report = profile_model(model, input_ids=torch.randint(words, (rows, length)))
    token = 2 * width * width + 2 * width * width * groups // heads + 3 * width * inner
    attention = 2 * rows * length * length * width
    macs = layers * (rows * length * token + attention) + rows * length * width * words
    # Angles are a product with an inner dimension of one, which versions of torch compute in two ways.
    assert report.macs == macs + report["model.rotary_emb"].forward.macs
    assert report["model.layers.1"].forward.macs == rows * length * token + attention
    assert report["model.layers.1.self_attn"].forward.macs > attention
    assert report.params == sum(p.numel() for p in model.parameters())


@distributed(world_size=2)
def test_a_replicated_model_counts_as_the_plain_one(rank: int) -> None:
    for case in ("mlp", "tied", "twice", "checkpoint_reentrant", "frozen"):
        batch = CASES[case].rank_batch(0, rank, 2)
        x = batch["tokens"][:, :-1] if "tokens" in batch else batch["x"]
        plain = profile_model(CASES[case].build(), x)
        model = CASES[case].build()
        ReplicatedOwner(model)
        report = profile_model(model, x)
        for mine, other in zip(report.modules, plain.modules, strict=True):
            assert (mine.params, mine.runs) == (other.params, other.runs)
            for phase in ("forward", "backward", "recompute"):
                a, b = getattr(mine, phase), getattr(other, phase)
                assert (a.flops, a.elementwise) == (b.flops, b.elementwise), (case, mine.name, phase)


def test_the_table_and_the_json() -> None:
    report = profile_model(Twice(), torch.randn(2, 6))
    lines = report.table(depth=1).splitlines()
    assert lines[0].split()[:3] == ["module", "params", "MACs"]
    assert lines[1].split()[0] == "(model)"
    assert any(line.startswith("  shared (Residual) x3") for line in lines)
    assert not any("up" in line for line in lines)
    found = json.loads(json.dumps(report.to_json()))
    assert found["modules"][0]["forward"]["macs"] == report.macs
    assert found["operators"]["forward"]["addmm"]["flops"] == report.flops
    assert report.model.seconds > 0
    with pytest.raises(LookupError, match="no module 'nope'"):
        report["nope"]
    with pytest.raises(ValueError, match="backward=False"):
        profile_model(nn.Identity(), torch.ones(3))
