"""Newton-Schulz orthogonalisation for Muon: matrix products only, and torch's are the right ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ds_kernels import check
from ds_kernels.native import DTYPES
from ds_kernels.registry import Kernel, define, ready

NAME = "newton_schulz"
SCHEMA = (
    "(Tensor x, *, int steps, float a, float b, float c, float eps, str method, ScalarType dtype) -> Tensor"
)
COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of Jordan et al. 2024: steepest at 0, within 0.3 of 1 after 5 steps
METHODS = ("standard", "gram")
GRAM_STEPS = 2  # after so many the Gram matrix is formed anew, from X: its small eigenvalues are rounded away
SYMMETRIC_FROM = 128  # rows from which halving a symmetric product pays on a CPU (kernels/muon/README.md)
Product = Callable[..., Tensor]


@torch.no_grad()
def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    method: Literal["standard", "gram"] = "standard",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each matrix, roughly: singular values go to about 1.

    Jordan et al. 2024 ("Muon"): X / |X|, then `steps` times X = a X + (b A + c A A) X with A = X X^T. `gram`
    is the same polynomial over the small Gram matrix, which is formed anew every second step, and X
    touched only then: fewer operations the longer the matrices are.
    Shapes: [m, n] or [batch, m, n] -> the same; computed in `dtype`, returned in x's.
    Raises: ValueError naming the argument, what it is and what fits.
    """
    a, b, c = coefficients
    ready("muon", x.device)
    out: Tensor = OP(x, steps=steps, a=a, b=b, c=c, eps=eps, method=method, dtype=dtype)
    return out


def checked(x: Tensor, numbers: dict[str, Any]) -> None:
    """Raise ValueError for anything that the op does not allow."""
    check.tensor(NAME, "x", x, dtypes=(*DTYPES, torch.float64))
    if x.dim() not in (2, 3):
        check.refuse(NAME, "x", x, "a matrix [m, n] or a batch of them [batch, m, n]")
    for name in ("a", "b", "c"):
        check.number(NAME, name, numbers[name], "a finite number", abs(numbers[name]) < float("inf"))
    check.number(NAME, "eps", numbers["eps"], "> 0", numbers["eps"] > 0)
    check.number(NAME, "steps", numbers["steps"], ">= 0", numbers["steps"] >= 0)
    if numbers["method"] not in METHODS:
        raise ValueError(f"{NAME}: method={numbers['method']!r}; allowed are {', '.join(METHODS)}")
    if numbers["dtype"] not in (*DTYPES, torch.float64):
        raise ValueError(
            f"{NAME}: dtype={numbers['dtype']}; allowed are {check.names((*DTYPES, torch.float64))}"
        )


def reference(x: Tensor, **numbers: Any) -> Tensor:
    """The op with whole products."""
    return _run(x, numbers, whole_product)


def halved(x: Tensor, **numbers: Any) -> Tensor:
    """The op with products that are known to be symmetric computed above the diagonal only."""
    return _run(x, numbers, symmetric_product if min(x.shape[-2:]) >= SYMMETRIC_FROM else whole_product)


def _run(x: Tensor, numbers: dict[str, Any], product: Product) -> Tensor:
    checked(x, numbers)
    if not x.numel():
        return x.clone()
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    rows = x.mT if x.size(-2) > x.size(-1) else x
    scaled = rows.to(wide)
    scaled = (scaled / scaled.norm(dim=(-2, -1), keepdim=True).clamp(min=numbers["eps"])).to(numbers["dtype"])
    iterate = _gram if numbers["method"] == "gram" and rows.size(-2) < rows.size(-1) else _standard
    found = iterate(scaled, numbers["steps"], (numbers["a"], numbers["b"], numbers["c"]), product)
    return (found.mT if rows is not x else found).to(x.dtype).contiguous()


def _standard(x: Tensor, steps: int, coefficients: Sequence[float], product: Product) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        gram = product(x, x.mT)
        x = whole_product(product(gram, gram, gram, b, c), x, x, a)
    return x


def _gram(x: Tensor, steps: int, coefficients: Sequence[float], product: Product) -> Tensor:
    """All in the Gram matrix R; the product of the steps so far meets X every GRAM_STEPS steps.

    R, that product and the step's Z = b R + c R R are polynomials of one symmetric matrix: symmetric, and so
    is every product of two of them.
    """
    a, b, c = coefficients
    for start in range(0, steps, GRAM_STEPS):
        gram = product(x, x.mT)
        factor: Tensor | None = None
        count = min(GRAM_STEPS, steps - start)
        for step in range(count):
            z = product(gram, gram, gram, b, c)
            if factor is None:
                factor = z.clone()
                factor.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                factor = product(z, factor, factor, a)
            if step + 1 < count:
                gram = product(z, gram, gram, a)
                gram = product(z, gram, gram, a)
        assert factor is not None
        x = factor @ x
    return x


def whole_product(
    left: Tensor, right: Tensor, added: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """alpha left @ right + beta added, rounded once."""
    if added is None:
        return left @ right
    add = torch.addmm if left.dim() == 2 else torch.baddbmm
    return add(added, left, right, beta=beta, alpha=alpha)


def symmetric_product(
    left: Tensor, right: Tensor, added: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """The same where it is symmetric: four bands of rows above the diagonal, 5/8 of the work."""
    rows = left.size(-2)
    out = left.new_empty((*left.shape[:-1], rows))
    band = -(-rows // 4)
    for start in range(0, rows, band):
        end = min(start + band, rows)
        part = None if added is None else added[..., start:end, start:]
        out[..., start:end, start:] = whole_product(
            left[..., start:end, :], right[..., start:], part, beta, alpha
        )
        out[..., end:, start:end] = out[..., start:end, end:].mT
    return out


def fake(x: Tensor, **numbers: Any) -> Tensor:
    """The op while torch traces."""
    checked(x, numbers)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def bound(args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[Tensor]) -> list[float]:
    """How far two ways of summing may part, in the Frobenius norm, and so in any element.

    With u the unit roundoff and k the longest sum, a product of matrices of spectral norm s <= 1.25 and at
    most n non-zero singular values is within (u + k 2^-24) s^2 sqrt(n) of another way of computing it. One
    step has the products A, A A and (..) X with weights of at most |b| s^2 + 2 |c| s^4 + |a| + |b| + |c| < 30
    together, and multiplies what was apart before by at most the polynomial's steepest slope, 4 on [0, 1.25].
    """
    (x,), steps = args[:1], kwargs["steps"]
    dtype, longest = kwargs["dtype"], max(x.shape[-2:])
    unit = torch.finfo(dtype).eps / 2 + longest * (2.0**-53 if dtype == torch.float64 else 2.0**-24)
    return [2 * 30 * 1.25 * unit * min(x.shape[-2:]) ** 0.5 * sum(4.0**k for k in range(steps))]


OP = define(
    Kernel(
        name=NAME,
        schema=SCHEMA,
        family="muon",
        reference=reference,
        fake=fake,
        torch={"cpu": halved},
        bound=bound,
    )
)
