"""ZeRO-Inference: tokens a second and bytes read a token, by where weights live and in how many bits.

    python packages/ds-offload/benchmarks/inference.py --folder /fast/disk [--size tiny|200m] [--batches 1,16]

One JSON line for each row. Weights are random, so nothing is downloaded. Each row is a process of its own.
Needs ds-zero and transformers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch

SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "vocab_size": 2048},
    "200m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14, "vocab_size": 8192},
}
TIERS = {  # row -> (params, format)
    "memory": None,
    "host": ("host", None),
    "nvme": ("nvme", None),
    "nvme int8": ("nvme", "int8"),
    "nvme int4": ("nvme", "int4"),
}


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def measure(size: str, row: str, folder: str, batch: int, tokens: int) -> dict[str, object]:
    """Generate `tokens` tokens for `batch` prompts of 8, after 2 that warm up."""
    import transformers

    from ds_offload import TieredStore
    from ds_zero import inference, materialize

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[size], num_attention_heads=8, max_position_embeddings=256)
    settings = TIERS[row]
    store = None
    with materialize(dtype=torch.bfloat16):
        model = transformers.LlamaForCausalLM(config)
    if settings is not None:
        store = TieredStore(params=settings[0], params_format=settings[1], nvme=folder)
    before = resident()
    inference(model, store=store, dtype=torch.bfloat16)
    ids = torch.randint(0, config.vocab_size, (batch, 8))

    def generate(count: int) -> None:
        with torch.no_grad():
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

    generate(2)
    volume = None if store is None else store.volume
    read = 0 if volume is None else volume.read_bytes
    begun = time.perf_counter()
    generate(tokens)
    took = time.perf_counter() - begun
    passed = 0 if volume is None else volume.read_bytes - read
    numel = sum(param.numel() for param in model.parameters())
    return {
        "benchmark": "inference",
        "size": size,
        "params": numel,
        "row": row,
        "batch": batch,
        "tokens_per_s": round(batch * tokens / took, 2),
        "read_bytes_per_pass": passed // tokens,
        "read_bytes_per_token": passed // (tokens * batch),
        "of_bf16_weights": round(passed / tokens / (2 * numel), 3),
        "read_gb_per_s": round(passed / took / 1e9, 2),
        "rss_grew_mb": round((resident() - before) / 1e6, 1),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", required=True, help="on the disk to measure")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--row", choices=TIERS, help="this one only, in this process")
    args = parser.parse_args()
    for batch in map(int, args.batches.split(",")):
        for row in [args.row] if args.row else TIERS:
            if args.row:
                print(json.dumps(measure(args.size, row, args.folder, batch, args.tokens)), flush=True)
                continue
            own = ["--row", row, "--batches", str(batch), "--tokens", str(args.tokens), "--size", args.size]
            subprocess.run([sys.executable, __file__, "--folder", args.folder, *own], check=True)


if __name__ == "__main__":
    main()
