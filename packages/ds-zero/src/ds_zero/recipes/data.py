"""Text into tokens: finds files, splits them by file, trains a tokenizer, cuts windows."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ds_zero.recipes.model import IGNORE

MAX_BYTES = 64 << 20  # of text that is read at most
_HELDOUT_ONE_IN = 20
_FILE_MARK = "<|file|>"
# Tests are repetitive, installed packages are not the standard library, and the character tables of
# `encodings` are near copies of each other, which would leak from one side of the split to the other.
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"),
}


@dataclass(frozen=True, slots=True)
class Document:
    """One file: its path below the root that was searched, and its text."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files to train on and files held out; no file is in both, no two files have the same text."""

    origin: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    left_out: int  # files beyond MAX_BYTES

    def heldout_sample(self, num_bytes: int) -> tuple[Document, ...]:
        """The first held-out files until `num_bytes` of UTF-8; the last one is cut to fit."""
        chosen: list[Document] = []
        for document in self.heldout:
            encoded = document.text.encode()[:num_bytes]
            if not encoded:
                break
            chosen.append(Document(document.name, encoded.decode(errors="ignore")))
            num_bytes -= len(encoded)
        return tuple(chosen)


def read_corpus(path: Path | None = None) -> Corpus:
    """Read a file or a folder of text, or the Python standard library, and hold out one file in twenty.

    The choice depends on the files' names alone, so it is the same at every run. A single file is cut
    in two at 95 % of its lines.

    Raises: FileNotFoundError or ValueError saying what was looked for.
    """
    root, names = _candidates(path)
    documents, left_out, seen, total = [], 0, set(), 0
    for name in sorted(names, key=_name_hash):
        text = _read_text(root / name)
        if text is None or text in seen:
            continue
        if total > MAX_BYTES:
            left_out += 1
            continue
        seen.add(text)
        total += len(text)
        documents.append(Document(name, text))
    if not documents:
        raise ValueError(
            f"no text in {root}: looked for {'files' if path else '*.py files'} that are UTF-8, not empty "
            f"and without NUL bytes among {len(names)} candidates; give --data a file or a folder of text"
        )
    if len(documents) == 1:
        documents = _cut_in_two(documents[0])
    heldout = [d for d in documents if _name_hash(d.name) % _HELDOUT_ONE_IN == 0] or documents[:1]
    if len(documents) == 2:
        heldout = documents[1:]
    held_names = {d.name for d in heldout}
    train = tuple(d for d in documents if d.name not in held_names)
    if not train:
        train, heldout = tuple(documents[1:]), documents[:1]
    return Corpus(str(root), train, tuple(heldout), left_out)


def _candidates(path: Path | None) -> tuple[Path, list[str]]:
    """(root, names below it) of the files that may hold text."""
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = (p.relative_to(root) for p in root.rglob("*.py"))
        return root, [str(p) for p in found if not _SKIPPED_FOLDERS & set(p.parts)]
    if path.is_file():
        return path.parent, [path.name]
    if path.is_dir():
        found = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
        return path, [str(p) for p in found if not any(part.startswith(".") for part in p.parts)]
    raise FileNotFoundError(f"--data {path}: there is no such file or folder")


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "big")


def _read_text(file: Path) -> str | None:
    try:
        if file.stat().st_size > MAX_BYTES:
            with file.open("rb") as stream:
                text = stream.read(MAX_BYTES).decode(errors="ignore")
        else:
            text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    return None if not text.strip() or "\0" in text else text


def _cut_in_two(document: Document) -> list[Document]:
    lines = document.text.splitlines(keepends=True)
    at = min(max(1, round(0.95 * len(lines))), len(lines) - 1)
    if at < 1:
        raise ValueError(
            f"{document.name} is a single line: nothing can be held out; give --data a file of several lines "
            "or a folder of several files"
        )
    head, tail = "".join(lines[:at]), "".join(lines[at:])
    return [Document(f"{document.name} (first 95 %)", head), Document(f"{document.name} (rest)", tail)]


class Tokenizer(Protocol):
    """Text to token numbers and back; `file_mark` stands before each file."""

    name: str
    vocab: int
    file_mark: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes, and one mark between files."""

    name, vocab, file_mark = "bytes", 257, 256

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class BpeTokenizer:
    """Byte-level byte pair encoding by the `tokenizers` library."""

    def __init__(self, serialized: str) -> None:
        from tokenizers import Tokenizer as Library

        self._library = Library.from_str(serialized)
        self.vocab: int = self._library.get_vocab_size()
        self.file_mark = int(self._library.token_to_id(_FILE_MARK) or 0)
        self.name = f"byte-level BPE of {self.vocab}"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids)))


def train_bpe(texts: Iterable[str], vocab: int) -> str:
    """Train a byte-level BPE tokenizer; returns its JSON."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[_FILE_MARK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return str(library.to_str())


def choose_tokenizer(kind: str) -> tuple[str, str | None]:
    """("bpe" or "bytes", a message when the choice had to change). Raises ValueError for other kinds."""
    if kind not in ("bpe", "bytes"):
        raise ValueError(f"--tokenizer {kind!r}: allowed are bpe and bytes")
    if kind == "bpe" and find_spec("tokenizers") is None:
        return "bytes", "the tokenizers library is not installed: training on bytes (pip install tokenizers)"
    return kind, None


def write_tokenizer(kind: str, corpus: Corpus, vocab: int, file: Path) -> None:
    """Train on the training files and put the tokenizer in `file`, whole or not at all."""
    serialized = "{}" if kind == "bytes" else train_bpe((d.text for d in corpus.train), vocab)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(serialized, encoding="utf-8")
    partial.replace(file)


def read_tokenizer(kind: str, file: Path) -> Tokenizer:
    """The tokenizer that `write_tokenizer` put in `file`."""
    return ByteTokenizer() if kind == "bytes" else BpeTokenizer(file.read_text(encoding="utf-8"))


def token_stream(tokenizer: Tokenizer, documents: Sequence[Document]) -> Tensor:
    """All documents one after the other, each behind a file mark: [N] int32."""
    encoded = tokenizer.encode([d.text for d in documents])
    pieces = [torch.tensor([tokenizer.file_mark, *ids], dtype=torch.int32) for ids in encoded]
    return torch.cat(pieces)


class Windows:
    """The training stream cut into windows: window i predicts tokens i*seq+1 ... (i+1)*seq."""

    def __init__(self, stream_N: Tensor, seq: int) -> None:
        if stream_N.numel() <= seq:
            raise ValueError(
                f"the training text is {stream_N.numel()} tokens, one window needs {seq + 1}: "
                "give more text or a smaller --seq"
            )
        self._stream_N = stream_N
        self.seq = seq

    def __len__(self) -> int:
        return (self._stream_N.numel() - 1) // self.seq

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(ids [T], targets [T]) int64"""
        at = index * self.seq
        return self._stream_N[at : at + self.seq].long(), self._stream_N[at + 1 : at + self.seq + 1].long()

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(ids [B, T], targets [B, T]) int64"""
        pairs = [self[i] for i in indices]
        return torch.stack([ids for ids, _ in pairs]), torch.stack([targets for _, targets in pairs])


@dataclass(frozen=True, slots=True)
class Heldout:
    """Held-out text as padded windows, and the bytes they stand for."""

    text: bytes
    ids_NT: Tensor
    targets_NT: Tensor  # IGNORE where a window is longer than the text

    @classmethod
    def cut(cls, text: bytes, stream_N: Tensor, seq: int, file_mark: int) -> Heldout:
        """Every byte of `text` is predicted once, from at most `seq` tokens before it."""
        stream_N = stream_N.long()
        num_windows = -(-(stream_N.numel() - 1) // seq)
        ids = torch.full((num_windows * seq,), file_mark)
        targets = torch.full((num_windows * seq,), IGNORE)
        ids[: stream_N.numel() - 1], targets[: stream_N.numel() - 1] = stream_N[:-1], stream_N[1:]
        return cls(text, ids.view(-1, seq), targets.view(-1, seq))
