"""With activations away gradients are the same bits, nothing is kept twice and nothing outlives its graph."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ds_core import checkpoint_blocks
from ds_kernels.aio import AioError
from ds_offload.activation import ActivationOffload, offload_activations, offload_blocks
from ds_offload.volume import Volume

ROWS, WIDTH, DEPTH = 24, 16, 4
KIB = 1024


class Block(nn.Module):
    """Saves inputs, outputs, masks, views of one projection and a normalisation's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        return x + self.drop(torch.tanh(self.out(scores @ v)))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(DEPTH)])


def batch() -> Tensor:
    return torch.randn(3, ROWS, WIDTH, generator=torch.Generator().manual_seed(7))


def forward(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    return model(batch().requires_grad_()).square().mean()  # type: ignore[no-any-return]


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    model = build()
    forward(model).backward()
    return grads(model)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., ActivationOffload]]:
    made: list[ActivationOffload] = []

    def one(model: nn.Module | None = None, **settings: Any) -> ActivationOffload:
        settings = {"min_bytes": 1, "ahead_bytes": 0, "to": f"nvme:{tmp_path}"} | settings
        made.append(offload_activations(nn.Module() if model is None else model, **settings))
        return made[-1]

    yield one
    for offload in made:
        offload.close()


def volume_of(offload: ActivationOffload) -> Volume:
    return offload._shelf._tier.volume  # type: ignore[attr-defined, no-any-return]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# -- the same bits -----------------------------------------------------------------------------------------


def attention(x: Tensor) -> Tensor:
    q, k, v = (x @ torch.ones(16, 48)).view(2, 8, 3, 16).unbind(2)
    return nn.functional.scaled_dot_product_attention(q, k, v)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "twice in one node": lambda x: (y := x * 2) * y,
    "views of one storage": lambda x: (y := x.exp()).sin() * y.view(-1, 16).t().cos().t().view_as(y) * y[0],
    "channels last": lambda x: nn.functional.conv2d(
        x.view(1, 2, 8, 16).contiguous(memory_format=torch.channels_last).exp(), torch.ones(3, 2, 3, 3)
    ),
    "expanded": lambda x: x.exp() * x[:, :, :1].exp().expand(2, 8, 16) * x.mean().exp().expand(2, 8, 16),
    "a column": lambda x: x.exp()[..., 3].sin() * x[..., 5].exp(),
    "attention": attention,
    "empty": lambda x: x.sum() * x[:0].exp().prod(),
    "integers and masks": lambda x: x.flatten()[torch.arange(99) % 7] * x.relu().flatten()[:99],
    "in place": lambda x: (x * 2).mul_(3).relu_().exp(),
    "complex": lambda x: torch.view_as_real(torch.fft.fft(x.exp()).conj() * torch.fft.fft(x)),
    "half": lambda x: x.bfloat16().exp().tanh().float() * x.half().exp().float(),
    "offset": lambda x: torch.cat([x.exp().flatten()[1:], x.flatten()])[3:].sin().cos(),
    "sorted": lambda x: x.exp().sort(-1).values.cumprod(-1),
}


def gradient_of(case: Callable[[Tensor], Tensor]) -> Tensor:
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    case(x).abs().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("ahead", [0, KIB, 1 << 30])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_same_bits(make: Callable[..., ActivationOffload], name: str, ahead: int) -> None:
    wanted = gradient_of(CASES[name])
    offload = make(ahead_bytes=ahead)
    with offload:
        got = gradient_of(CASES[name])
    assert torch.equal(got, wanted)
    traffic = offload.traffic()
    assert traffic.saved_bytes > 0
    assert (traffic.sent_bytes > 0) == (traffic.peak_bytes > ahead)
    assert traffic.live_bytes == 0


@pytest.mark.parametrize("ahead", [0, 4 * KIB, 64 * KIB, 1 << 30])
def test_steps_of_a_model_and_what_they_move(
    make: Callable[..., ActivationOffload], expected: list[Tensor], ahead: int
) -> None:
    model = build()
    pending = 8 * KIB
    offload = make(model, ahead_bytes=ahead, pending_bytes=pending)
    for step in (1, 2):
        model.zero_grad()
        with offload:
            loss = forward(model)
        assert offload.traffic().live_bytes > 0
        loss.backward()
        assert_same(grads(model), expected)
        traffic = offload.traffic()
        assert traffic.live_bytes == traffic.here_bytes == 0
        assert traffic.saved_bytes == step * traffic.peak_bytes  # all of a step's forward lives at its end
    largest = 3 * ROWS * 3 * WIDTH * 4
    assert traffic.peak_here_bytes <= min(traffic.peak_bytes, ahead + pending + 2 * largest)
    assert (traffic.sent_bytes > 0) == (ahead < traffic.peak_bytes)
    if ahead >= 64 * KIB:  # little comes back twice where the pieces of a block fit
        assert traffic.fetched_bytes <= 1.25 * traffic.sent_bytes
    used = volume_of(offload).used
    assert (used > 0) == (traffic.sent_bytes > 0)  # kept for the next step
    offload.settle()
    assert volume_of(offload).used == 0


def test_parameters_buffers_and_their_views_stay(make: Callable[..., ActivationOffload]) -> None:
    model = nn.Linear(64, 64)
    model.register_buffer("scale", torch.rand(64, 64))
    frozen = nn.Parameter(torch.rand(64, 64), requires_grad=False)
    x = torch.randn(8, 64, requires_grad=True)
    offload = make(model, min_bytes=4 * KIB)
    with offload:
        y = model(x) @ model.scale.t() @ model.weight.detach().view(64, 64) @ frozen.t()
        y.sum().backward()
    assert offload.traffic().saved_bytes == 0
    with offload:
        (x @ (model.weight * 2)).sum().backward()  # made of a parameter is not the parameter
    assert offload.traffic().saved_bytes == 64 * 64 * 4


def test_what_autocast_makes_of_a_parameter_stays(make: Callable[..., ActivationOffload]) -> None:
    model = nn.Linear(64, 64)
    offload = make(model, min_bytes=4 * KIB)
    x = torch.randn(64, 64, requires_grad=True)
    with offload, torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert offload.traffic().saved_bytes == 64 * 64 * 2  # x in bfloat16, and not the weight


def test_one_copy_of_what_is_saved_twice_and_of_the_views_of_one_storage(
    make: Callable[..., ActivationOffload],
) -> None:
    x = torch.randn(4, 96, requires_grad=True)
    offload = make(min_bytes=1024, ahead_bytes=4096)
    with offload:
        y = x * 1  # 1536 bytes
        parts = y.split(32, dim=1)  # 512 bytes each: below, but of a storage that is away
        loss = (
            (y * y).sum()
            + (y.t() * y.t()).sum()
            + sum((a * b).sum() for a, b in zip(parts, parts, strict=True))
        )
        torch.rand(1024, requires_grad=True).exp().sin()  # 4096 bytes, which push the others out
    assert offload.traffic().saved_bytes == 1536 + 4096
    offload.settle()
    loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 6 * x.detach())
    assert offload.traffic().fetched_bytes == 1536


def test_small_tensors_stay(make: Callable[..., ActivationOffload]) -> None:
    offload = make(min_bytes=1025)
    with offload:
        torch.rand(256, requires_grad=True).exp().sum().backward()
    assert offload.traffic().saved_bytes == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_plain_bytes_stays(make: Callable[..., ActivationOffload]) -> None:
    offload = make()
    x = torch.rand(40, 40, requires_grad=True)
    sparse = torch.eye(40).to_sparse()
    nested = torch.nested.nested_tensor([torch.rand(30, 4), torch.rand(20, 4)], requires_grad=True)
    with offload:
        torch.sparse.mm(sparse, x).sum().backward()
        nested.relu().to_padded_tensor(0.0).sum().backward()
    assert x.grad is not None
    assert nested.grad is not None
    assert offload.traffic().saved_bytes == 0


def test_nothing_is_done_without_gradients(make: Callable[..., ActivationOffload]) -> None:
    offload = make(model := build())
    with torch.no_grad(), offload:
        model(batch())
    assert offload.traffic().saved_bytes == 0


# -- graphs that live longer, shorter, or inside of others ---------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 8 * KIB])
def test_a_graph_that_is_kept_runs_again(
    make: Callable[..., ActivationOffload], expected: list[Tensor], ahead: int
) -> None:
    offload = make(model := build(), ahead_bytes=ahead)
    with offload:
        loss = forward(model)
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert_same(grads(model), expected)
    assert offload.traffic().live_bytes > 0
    model.zero_grad()
    loss.backward()
    assert_same(grads(model), expected)
    assert offload.traffic().live_bytes == 0


def test_the_gradient_of_a_gradient(make: Callable[..., ActivationOffload]) -> None:
    def second(x: Tensor) -> Tensor:
        y = (x.exp() * x.sin()).tanh()
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(first.square().sum(), x)
        return again

    x = torch.randn(200, requires_grad=True)
    wanted = second(x)
    offload = make(pending_bytes=1)
    with offload:
        assert torch.equal(second(x), wanted)
    assert offload.traffic().fetched_bytes > 0
    gc.collect()
    assert offload.traffic().live_bytes == 0


def test_a_dropped_graph_gives_everything_back(make: Callable[..., ActivationOffload]) -> None:
    offload = make(model := build(), ahead_bytes=2 * KIB)
    for _ in range(2):
        with offload:
            loss = forward(model)
        assert offload.traffic().live_bytes > 0
        del loss
        assert offload.traffic().live_bytes == 0
    offload.settle()
    assert volume_of(offload).used == 0
    assert volume_of(offload).size == 0


def test_a_tensor_that_stays_does_not_keep_its_own_graph_alive(
    make: Callable[..., ActivationOffload],
) -> None:
    x = torch.randn(10, requires_grad=True)
    with make(min_bytes=KIB):
        y = x.exp()  # saves its output
    memory = StorageWeakRef(y.untyped_storage())  # type: ignore[no-untyped-call]
    del y
    assert memory.expired()  # type: ignore[no-untyped-call]


def test_what_left_is_not_held(make: Callable[..., ActivationOffload]) -> None:
    x = torch.randn(512, requires_grad=True)
    offload = make()
    with offload:
        y = x * 2
        z = y.sin()
    offload.settle()
    memory = StorageWeakRef(y.untyped_storage())  # type: ignore[no-untyped-call]
    del y
    assert memory.expired()  # type: ignore[no-untyped-call]
    z.sum().backward()
    assert x.grad is not None


def test_an_exception_in_the_forward(make: Callable[..., ActivationOffload], expected: list[Tensor]) -> None:
    offload = make(model := build())

    def stop(*_: object) -> None:
        raise KeyError("here")

    handle = model[-1].register_forward_hook(stop)
    with pytest.raises(KeyError, match="here"), offload:
        forward(model)
    handle.remove()
    gc.collect()
    assert offload.traffic().live_bytes == 0
    with offload:
        loss = forward(model)
    loss.backward()
    assert_same(grads(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_inside(
    make: Callable[..., ActivationOffload], expected: list[Tensor], reentrant: bool
) -> None:
    class Again(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    model = nn.Sequential(*[Again(block) for block in build()])
    offload = make(model)
    with offload:
        loss = forward(model)
    assert offload.traffic().saved_bytes == (DEPTH + 1) * 3 * ROWS * WIDTH * 4  # inputs, and what is squared
    loss.backward()
    assert_same(grads(model), expected)
    assert offload.traffic().live_bytes == 0


def test_it_keeps_the_inputs_of_checkpointed_blocks(
    make: Callable[..., ActivationOffload], expected: list[Tensor]
) -> None:
    model = build()
    offload = make(model, ahead_bytes=3 * ROWS * WIDTH * 4)
    checkpoint_blocks(model, keep=offload)
    for _ in range(2):
        model.zero_grad()
        loss = forward(model)
        assert offload.traffic().live_bytes == DEPTH * 3 * ROWS * WIDTH * 4
        loss.backward()
        assert_same(grads(model), expected)
    assert offload.traffic().live_bytes == 0


def test_chosen_blocks_only_and_back(make: Callable[..., ActivationOffload], expected: list[Tensor]) -> None:
    model = build()
    every, some = make(model), make(model)
    with every:
        forward(model).backward()
    model.zero_grad()
    swap = offload_blocks(model, some, 2)
    forward(model).backward()
    assert_same(grads(model), expected)
    assert 0.4 < some.traffic().saved_bytes / every.traffic().saved_bytes < 0.6
    swap.remove()
    before = some.traffic().saved_bytes
    forward(model).backward()
    assert some.traffic().saved_bytes == before


def test_one_inside_of_another(make: Callable[..., ActivationOffload], expected: list[Tensor]) -> None:
    model = build()
    outer, inner = make(model), make(model)
    offload_blocks(model, inner, lambda name, module: name == "1")
    with outer, outer:
        forward(model).backward()
    assert_same(grads(model), expected)
    assert inner.traffic().saved_bytes * 2 < outer.traffic().saved_bytes
    assert inner.traffic().live_bytes == outer.traffic().live_bytes == 0


def test_two_forwards_before_two_backwards(
    make: Callable[..., ActivationOffload], expected: list[Tensor]
) -> None:
    model = build()
    offload = make(model, ahead_bytes=4 * KIB)
    with offload:
        losses = [forward(model), forward(model)]
    for loss in losses:  # the first one first, as in a pipeline
        model.zero_grad()
        loss.backward()
        assert_same(grads(model), expected)
    del losses, loss
    assert offload.traffic().live_bytes == 0


def test_two_threads(make: Callable[..., ActivationOffload]) -> None:
    offload = make(ahead_bytes=2 * KIB)
    wanted = gradient_of(CASES["attention"])
    failed: list[object] = []

    def work() -> None:
        for _ in range(30):
            with offload():
                if not torch.equal(gradient_of(CASES["attention"]), wanted):
                    failed.append("other bits")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert offload.traffic().saved_bytes > 0
    assert offload.traffic().live_bytes == 0


# -- what must be refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1 << 30])
@pytest.mark.parametrize("min_bytes", [1, 1 << 20])
def test_a_write_to_a_saved_tensor_is_refused_as_without(
    make: Callable[..., ActivationOffload], ahead: int, min_bytes: int
) -> None:
    def attempt() -> str:
        x = torch.rand(300, requires_grad=True)
        y = x * 2
        z = y.exp().sum() + y.sin().sum()
        with torch.no_grad():
            y.view(3, 100)[1].add_(1)
        with pytest.raises(RuntimeError) as caught:
            z.backward()
        return str(caught.value)

    plain = attempt()
    with make(min_bytes=min_bytes, ahead_bytes=ahead):
        ours = attempt()
    shared = "one of the variables needed for gradient computation has been modified by an inplace operation"
    assert shared in plain
    assert shared in ours
    assert "is at version 1; expected version 0 instead" in ours


def test_a_tensor_that_is_saved_again_after_a_write_is_another(
    make: Callable[..., ActivationOffload],
) -> None:
    x = torch.rand(300, requires_grad=True)
    offload = make()
    with offload:
        y = x * 2
        early = y.detach().requires_grad_()
        first = early.sin()
        with torch.no_grad():
            early.add_(1)
        second = early.sin()
    assert offload.traffic().saved_bytes == 2 * 1200
    second.sum().backward()
    assert torch.equal(early.grad, early.detach().cos())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="inplace"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"to": "host"}, 'give "nvme:FOLDER"'),
        ({"to": "disk"}, 'allowed are "host", "nvme:FOLDER"'),
        ({"to": "nvme:"}, 'allowed are "host", "nvme:FOLDER"'),
        ({"to": "nvme:/no/such/folder"}, "is no folder"),
        ({"min_bytes": 0}, "min_bytes=0: allowed are whole numbers of bytes from 1"),
        ({"ahead_bytes": -1}, "ahead_bytes=-1: allowed are whole numbers of bytes from 0"),
        ({"pending_bytes": 1.5}, "pending_bytes=1.5"),
    ],
)
def test_settings_that_cannot_be(
    make: Callable[..., ActivationOffload], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        make(**settings)


def test_a_full_disk_is_an_error_of_the_forward(
    make: Callable[..., ActivationOffload], expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    offload = make(model := build())
    volume, room = volume_of(offload), [5]
    allocate = volume.allocate

    def little(nbytes: int) -> Any:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "no space left", volume.path)
        return allocate(nbytes)

    monkeypatch.setattr(volume, "allocate", little)
    with pytest.raises(OSError, match="no space left") as caught, offload:
        forward(model)
    assert caught.value.filename == volume.path
    del caught
    gc.collect()
    assert offload.traffic().live_bytes == 0
    monkeypatch.undo()
    with offload:
        loss = forward(model)
    loss.backward()
    assert_same(grads(model), expected)


def test_a_file_that_lost_its_end_is_an_error_of_the_backward(make: Callable[..., ActivationOffload]) -> None:
    offload = make(model := build())
    with offload:
        loss = forward(model)
    offload.settle()
    os.ftruncate(volume_of(offload).fd, 0)
    with pytest.raises(AioError, match="the file ends at byte") as caught:
        loss.backward()
    assert caught.value.path == volume_of(offload).path
    del loss, caught
    gc.collect()
    assert offload.traffic().live_bytes == 0


def test_after_close(make: Callable[..., ActivationOffload]) -> None:
    offload = make(model := build())
    with offload:
        loss = forward(model)
    offload.close()
    with pytest.raises(RuntimeError, match="closed"):
        loss.backward()
    with pytest.raises(RuntimeError, match="closed"), offload:
        forward(model)
    offload.close()


def test_a_volume_that_is_given_stays_open(make: Callable[..., ActivationOffload], tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    offload = make(model := build(), to=volume)
    with offload:
        forward(model).backward()
    assert volume.used > 0
    offload.close()
    assert volume.used == 0
    volume.free(volume.allocate(1))
    volume.close()


def test_an_end_while_the_lock_is_taken_waits_for_it(make: Callable[..., ActivationOffload]) -> None:
    offload = make(model := build())
    with offload:
        loss = forward(model)
    with offload._shelf._lock:
        del loss  # as a garbage collection inside one of its own lines would
        assert sum(offload._shelf._ledger.bytes.values()) > 0
    assert offload.traffic().live_bytes == 0


def test_the_report_in_a_line(make: Callable[..., ActivationOffload]) -> None:
    offload = make(ahead_bytes=1 << 30)
    with offload:
        torch.rand(1 << 18, requires_grad=True).exp().sum().backward()
    assert str(offload.traffic()).startswith(
        "activations: 1.0 MiB saved, 0.0 away, 0.0 back; at most 1.0 of 1.0 MiB"
    )
