"""What each overlap mode hides: forward, backward and step of a small model.

    python packages/ds-offload/benchmarks/overlap.py --nvme <folder>

On a CPU the update and the backward want the same cores. `--device-ms` stands for what a device would compute
in: each layer then sleeps that long in its forward and twice as long in its backward, in which host and disk
are free to work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from ds_core.state.owner import ReplicatedOwner
from ds_core.train.clip import clip_grad_norm_
from ds_core.train.optim import ShardedOptimizer
from ds_kernels.optim import FusedAdamW
from ds_offload import TieredStore


class _Device(torch.autograd.Function):
    """Takes time, and no core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad, None


class Layer(nn.Module):
    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(width, width), seconds

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x))
        return _Device.apply(x, self.seconds) if self.seconds else x  # type: ignore[no-untyped-call, no-any-return]


def measure(args: argparse.Namespace, tier: str, update: str) -> dict[str, float]:
    """Medians in ms over the steps after the first three."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Layer(args.width, args.device_ms / 1000) for _ in range(args.layers)])
    optimizer = FusedAdamW(model.parameters(), lr=1e-3)
    settings = {"masters": tier, "moments": tier, "grads": tier, "nvme": args.nvme, "update": update}
    store = TieredStore(**settings, delay_after=2, chunk_numel=1 << 20, speculate_bytes=4 << 30)
    owner = ReplicatedOwner(model, dtype=torch.bfloat16, store=store, bucket_numel=1)
    sharded = ShardedOptimizer(optimizer, owner)
    x = torch.randn(args.batch, args.width, dtype=torch.bfloat16)
    rows: list[tuple[float, ...]] = []
    for _ in range(args.steps + 3):
        at = [time.perf_counter()]
        loss = model(x).float().square().mean()
        at.append(time.perf_counter())
        loss.backward()
        at.append(time.perf_counter())
        clip_grad_norm_(optimizer, 1e6)
        optimizer.step()
        optimizer.zero_grad()
        at.append(time.perf_counter())
        rows.append((at[1] - at[0], at[2] - at[1], at[3] - at[2], at[3] - at[0]))
    found = {
        name: 1000 * statistics.median(row[index] for row in rows[3:])
        for index, name in enumerate(("forward", "backward", "step", "all"))
    }
    elsewhere: Any = sharded.elsewhere
    if elsewhere.speculation is not None:
        counts = elsewhere.speculation.counts
        found["kept"] = 100 * counts.kept / sum(-(-unit.layout.numel // (1 << 20)) for unit in owner.units)
    store.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvme", required=True, help="folder on a fast disk")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3, help="of all modes; the best of each is shown")
    parser.add_argument("--device-ms", type=float, default=0.0, help="per layer and forward")
    args = parser.parse_args()
    print(
        f"{args.layers} layers of {args.width}, {torch.get_num_threads()} threads, device {args.device_ms} ms"
    )
    print("tier  update         forward  backward      step       all  kept %")
    cells = [(tier, update) for tier in ("host", "nvme") for update in ("step", "speculative", "delayed")]
    rows: dict[tuple[str, str], list[dict[str, float]]] = {cell: [] for cell in cells}
    for turn in range(args.rounds):  # there and back: other work on the machine hits all of them
        for cell in cells if turn % 2 else cells[::-1]:
            rows[cell].append(measure(args, *cell))
    for tier, update in cells:
        row = min(rows[tier, update], key=lambda found: found["all"])
        times = "".join(f"{row[name]:10.1f}" for name in ("forward", "backward", "step", "all"))
        print(f"{tier:5} {update:12} {times}  {row.get('kept', float('nan')):6.0f}")


if __name__ == "__main__":
    main()
