"""Where a config can be read from: a mapping, a file, a JSON string, or base64 of one."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_core.ground.settings import Origin
from ds_core.setup.config import Layer

Source = Mapping[str, Any] | str | Path | Layer


def read_layer(source: Source) -> Layer:
    """A mapping, a path, a JSON string or base64 of one -> its values and where they came from.

    Raises: OSError for a path that cannot be read; ValueError for text that is no JSON object, or has a
    key twice.
    """
    if isinstance(source, Layer):
        return source
    if isinstance(source, Mapping):
        return Layer(source, Origin("code"))
    if isinstance(source, Path) or not str(source).lstrip().startswith("{"):
        path = Path(source)
        if _is_file(path):
            return Layer(_parse(path.read_text(), f"file {path}"), Origin("file", str(path)))
        text = None if isinstance(source, Path) else _from_base64(source)
        if text is None:
            raise FileNotFoundError(
                f"no config file {str(source)!r}; allowed: a dict, the path of a JSON file, a JSON string, or"
                " base64 of one"
            )
        return Layer(_parse(text, "base64 config"), Origin("code", "base64"))
    return Layer(_parse(str(source), "config string"), Origin("code", "JSON string"))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a long base64 string is no path
        return False


def _from_base64(text: str) -> str | None:
    try:
        return base64.urlsafe_b64decode(text.encode("ascii")).decode()
    except (binascii.Error, UnicodeError):
        return None


def _parse(text: str, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{what}: {', '.join(map(repr, twice))} is there twice in one section; keep one")
        return dict(pairs)

    try:
        tree = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is no JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{what} is a {type(tree).__name__}; it must be an object of keys {{...}}")
    return tree
