"""Every op, implementation, dtype and shape against the reference; adding a kernel adds no test code."""

from __future__ import annotations

import os

import pytest
import torch

from ds_kernels.conformance.compare import (
    Case,
    cases,
    disagreements,
    gradient_samples,
    named,
    samples,
    tensors,
)
from ds_kernels.conformance.wrong import accepted
from ds_kernels.registry import FAMILIES, NAMESPACE, Kernel, load, registry

CPU = torch.device("cpu")
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
KERNELS = [kernel for family in FAMILIES for kernel in registry().of(family)]


def kernel_id(kernel: Kernel) -> str:
    return kernel.name


@pytest.fixture(scope="module")
def found(own_cache: None) -> list[Case]:
    return list(cases(CPU))


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_id)
def test_implementations_agree_with_the_reference(kernel: Kernel, found: list[Case]) -> None:
    mine = [case for case in found if case.kernel is kernel]
    names = [case.name for case in mine]
    print(f"{kernel.name}: {', '.join(names) or 'the reference only'}")
    assert kernel.native is None or any(name.startswith("native") for name in names)
    assert kernel.triton is None or "triton interpreted" in names
    for case in mine:
        wrong = list(disagreements(case))
        assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_id)
def test_wrong_calls_are_refused(kernel: Kernel, found: list[Case]) -> None:
    reference = Case(kernel, "reference", kernel.reference, CPU)
    for case in [reference, *(case for case in found if case.kernel is kernel)]:
        wrong = list(accepted(case))
        assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_id)
def test_torch_accepts_the_op(kernel: Kernel) -> None:
    """torch.library's own checks of schema, autograd registration, fake tensors and tracing."""
    load(kernel.family, CPU)
    op = getattr(getattr(torch.ops, NAMESPACE), kernel.name).default
    every = [s for s in samples(kernel, CPU) if sum(t.numel() for _, t in tensors(kernel, s))]
    for sample in every[:: max(1, len(every) // 3)][:3]:
        torch.library.opcheck(op, sample.args, sample.kwargs)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.backward], ids=kernel_id)
def test_gradients_are_those_of_finite_differences(kernel: Kernel) -> None:
    """In float64, where every implementation is the reference."""
    op = getattr(getattr(torch.ops, NAMESPACE), kernel.name).default
    for sample in gradient_samples(kernel):
        places = [name for (name, _), t in tensors(kernel, sample) if t.requires_grad]
        assert places, sample.label

        def run(*inputs: torch.Tensor, sample=sample, places=places) -> object:
            out = op(**{**named(kernel, sample), **dict(zip(places, inputs, strict=True))})
            several = isinstance(out, (tuple, list))
            return tuple(t for t in out if t.requires_grad) if several else out

        inputs = [named(kernel, sample)[name] for name in places]
        assert torch.autograd.gradcheck(run, inputs), sample.label
