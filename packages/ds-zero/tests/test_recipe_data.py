"""Text for the recipe: which files, which split, tokens there and back."""

import sys
from pathlib import Path

import pytest
import torch

from ds_zero.recipes import data
from ds_zero.recipes.model import IGNORE


def folder_of_text(root: Path, num_files: int = 60) -> Path:
    for number in range(num_files):
        folder = root / f"part{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(f"file {number}\n" + "café and words\n" * (number + 1))
    return root


def test_the_standard_library_is_found_without_tests() -> None:
    corpus = data.read_corpus()
    names = {d.name for d in corpus.train} | {d.name for d in corpus.heldout}
    assert "argparse.py" in names
    assert not any(name.startswith(("test/", "site-packages/", "encodings/")) for name in names)
    assert sum(len(d.text) for d in corpus.train) > 2_000_000


def test_split_is_by_file_and_repeats(tmp_path: Path) -> None:
    root = folder_of_text(tmp_path)
    one, two = data.read_corpus(root), data.read_corpus(root)
    assert one == two
    train, heldout = {d.name for d in one.train}, {d.name for d in one.heldout}
    assert not train & heldout
    assert len(train | heldout) == 60
    assert heldout


def test_equal_files_are_read_once(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / name).write_text("the same\ntext\n")
    (tmp_path / "z").write_text("another\ntext\n")
    corpus = data.read_corpus(tmp_path)
    assert len(corpus.train) + len(corpus.heldout) == 2
    assert {d.text for d in corpus.train} != {d.text for d in corpus.heldout}


def test_a_single_file_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    corpus = data.read_corpus(file)
    assert corpus.train[0].text.endswith("line 94\n")
    assert corpus.heldout[0].text.startswith("line 95\n")
    file.write_text("one line")
    with pytest.raises(ValueError, match=r"book\.txt is a single line"):
        data.read_corpus(file)


def test_no_text_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "zeros").write_bytes(bytes(100))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"no text in .*UTF-8.*among 3 candidates"):
        data.read_corpus(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--data .*nowhere"):
        data.read_corpus(tmp_path / "nowhere")


def test_more_text_than_the_limit_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_BYTES", 2000)
    corpus = data.read_corpus(folder_of_text(tmp_path))
    assert corpus.left_out == 60 - len(corpus.train) - len(corpus.heldout) > 0


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_text_survives_the_tokenizer(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("tokenizers", reason="the tokenizers library is not installed")
    corpus = data.read_corpus(folder_of_text(tmp_path / "text"))
    file = tmp_path / "tokenizer.json"
    data.write_tokenizer(kind, corpus, 300, file)
    tokenizer = data.read_tokenizer(kind, file)
    text = "naïve café\n\tdef f(x): return x  # ∑\n"
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    assert max(max(ids) for ids in tokenizer.encode([text, "words"])) < tokenizer.vocab
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["tokenizer.json"]


def test_bytes_take_over_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    kind, message = data.choose_tokenizer("bpe")
    assert kind == "bytes"
    assert "pip install tokenizers" in str(message)
    with pytest.raises(ValueError, match="allowed are bpe and bytes"):
        data.choose_tokenizer("words")


def test_windows_shift_targets_by_one_and_tile_the_stream() -> None:
    windows = data.Windows(torch.arange(21, dtype=torch.int32), 5)
    assert len(windows) == 4
    ids, targets = windows.batch([0, 3])
    assert ids.tolist() == [[0, 1, 2, 3, 4], [15, 16, 17, 18, 19]]
    assert targets.tolist() == [[1, 2, 3, 4, 5], [16, 17, 18, 19, 20]]
    with pytest.raises(ValueError, match="training text is 3 tokens"):
        data.Windows(torch.arange(3), 5)


def test_heldout_predicts_every_byte_once() -> None:
    documents = [data.Document("a", "hello"), data.Document("b", "wörld!")]
    tokenizer = data.ByteTokenizer()
    stream = data.token_stream(tokenizer, documents)
    heldout = data.Heldout.cut("hellowörld!".encode(), stream, 4, tokenizer.file_mark)
    kept = heldout.targets_NT[heldout.targets_NT != IGNORE]
    assert bytes(i for i in kept.tolist() if i != data.ByteTokenizer.file_mark) == heldout.text
    assert heldout.ids_NT.flatten()[1 : kept.numel()].tolist() == kept[:-1].tolist()


def test_heldout_sample_is_cut_to_size(tmp_path: Path) -> None:
    corpus = data.read_corpus(folder_of_text(tmp_path))
    sample = corpus.heldout_sample(41)
    assert 38 <= sum(len(d.text.encode()) for d in sample) <= 41
    assert sample[0].name == corpus.heldout[0].name
