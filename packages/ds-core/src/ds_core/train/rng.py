"""RngState: every random generator of every rank in a checkpoint, exact when the world is the same."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_core.state.checkpoint_peers import Peers
from ds_core.state.shard import FlatShard, Json, SavedTensor

_BASE = "0/torch"


class RngState:
    """torch's CPU and device generators, Python's, numpy's, and generators given by name.

    At the world size of the save every rank gets its own streams back, bit for bit. At another one there is
    nothing to get back: every generator is seeded with sha256 of (rank 0's saved torch stream, generator,
    new world, new rank), so that two resumes are alike and no two ranks draw the same. The same holds for a
    generator that the checkpoint lacks, such as the device's when the save was made without one.
    """

    def __init__(
        self,
        *,
        device: torch.device | None = None,
        generators: Mapping[str, torch.Generator] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        peers = Peers(group)
        self._rank, self._world = peers.rank, peers.world
        self._device = device if device is not None and device.type != "cpu" else None
        self._generators = dict(generators or {})
        clash = sorted({"torch", "device", "python", "numpy"} & set(self._generators))
        if clash:
            raise ValueError(f"generators {clash}: these names are taken by the built-in ones; choose others")
        self._read: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor | FlatShard | Json]:
        """This rank's streams, under its number."""
        states: dict[str, Tensor] = {"torch": torch.get_rng_state()}
        if self._device is not None:
            states["device"] = torch.get_device_module(self._device).get_rng_state(self._device)
        for name, generator in self._generators.items():
            states[name] = generator.get_state()
        version, words, gauss = random.getstate()
        states["python"] = torch.tensor(words, dtype=torch.int64)
        kind, key, position, has_gauss, cached = np.random.get_state(legacy=True)
        states["numpy"] = torch.from_numpy(np.asarray(key).astype(np.int64))
        found: dict[str, Tensor | FlatShard | Json] = {"world": self._world}
        found |= {f"{self._rank}/{name}": state.cpu() for name, state in states.items()}
        found[f"{self._rank}/python/rest"] = [version, gauss]
        found[f"{self._rank}/numpy/rest"] = [str(kind), int(position), int(has_gauss), float(cached)]
        return found

    def load_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor | FlatShard]:
        """Room for this rank's streams, and for the one that others are derived from."""
        if _BASE not in saved:
            raise ValueError(f"the checkpoint has no {_BASE!r}: it was not written by RngState")
        wanted = {_BASE, *(name for name in saved if name.startswith(f"{self._rank}/"))}
        self._read = {name: torch.empty(saved[name].shape, dtype=saved[name].dtype) for name in wanted}
        return dict(self._read)

    def load_state_dict(self, values: Mapping[str, Json]) -> None:
        """Set every generator."""
        read, self._read = self._read, {}
        base = bytes(read[_BASE].tolist())
        same = values["world"] == self._world
        states = {name: read.get(f"{self._rank}/{name}") if same else None for name in self._names()}
        for name, state in states.items():
            seed = self._seed(base, name)
            if name == "python":
                self._set_python(state, values, seed)
            elif name == "numpy":
                self._set_numpy(state, values, seed)
            else:
                self._set_torch(name, state, seed)

    def _names(self) -> list[str]:
        device = ["device"] if self._device is not None else []
        return ["torch", *device, "python", "numpy", *self._generators]

    def _seed(self, base: bytes, name: str) -> int:
        text = base + f"|{name}|{self._world}|{self._rank}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")

    def _set_torch(self, name: str, state: Tensor | None, seed: int) -> None:
        if name == "torch":
            generator = torch.default_generator
        elif name == "device":
            self._set_device(state, seed)
            return
        else:
            generator = self._generators[name]
        if state is None:
            generator.manual_seed(seed)
        else:
            generator.set_state(state)

    def _set_device(self, state: Tensor | None, seed: int) -> None:
        module = torch.get_device_module(self._device)
        if state is None:
            module.manual_seed(seed)
        else:
            module.set_rng_state(state, self._device)

    def _set_python(self, state: Tensor | None, values: Mapping[str, Json], seed: int) -> None:
        if state is None:
            random.seed(seed)
            return
        version, gauss = values[f"{self._rank}/python/rest"]
        random.setstate((version, tuple(state.tolist()), gauss))

    def _set_numpy(self, state: Tensor | None, values: Mapping[str, Json], seed: int) -> None:
        if state is None:
            np.random.seed(seed % 2**32)
            return
        kind, position, has_gauss, cached = values[f"{self._rank}/numpy/rest"]
        np.random.set_state((kind, state.numpy().astype(np.uint32), position, has_gauss, cached))
