"""Which hosts and slots a job gets: hostfile, --include and --exclude, and SLURM's node lists (pure)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

# What may follow ssh as a host. No leading dash, so that it can never be read as an option.
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:-]*")
_LINE = re.compile(r"(?P<host>\S+)\s+slots\s*=\s*(?P<slots>\d+)")

Slots = dict[str, list[int]]  # host -> slot numbers, in the order of the hostfile


def check_host(name: str) -> str:
    """The name back. Raises ValueError for anything that is not a plain `host` or `user@host`."""
    if not _HOST.fullmatch(name):
        raise ValueError(f"host {name!r}: allowed are letters, digits and . _ - : (and one user@ in front)")
    return name


def read_hostfile(path: Path) -> Slots:
    """Parse lines `host slots=4`; blank lines and # comments are skipped.

    Raises: ValueError naming file and line; FileNotFoundError.
    """
    found: Slots = {}
    for number, raw in enumerate(path.read_text().splitlines(), start=1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path}:{number}: {raw!r} is not of the form `host slots=4`")
        host = check_host(match["host"])
        if host in found:
            raise ValueError(
                f"{path}:{number}: host {host!r} is listed twice; give it one line with all slots"
            )
        if int(match["slots"]) == 0:
            raise ValueError(f"{path}:{number}: host {host!r} has no slots; remove the line")
        found[host] = list(range(int(match["slots"])))
    if not found:
        raise ValueError(f"{path}: no hosts in it; expected lines of the form `host slots=4`")
    return found


def select(pool: Mapping[str, list[int]], include: str | None, exclude: str | None) -> Slots:
    """Cut a pool down by DeepSpeed's grammar: `host@host:0,2` is all of one host and two slots of another.

    Raises: ValueError for a host or slot that the pool does not have, and if nothing is left.
    """
    if include and exclude:
        raise ValueError(
            "--include and --exclude cannot both be given; say either what to use or what not to"
        )
    if include:
        wanted = _parse_filter(include, pool, "--include")
        return {host: wanted[host] for host in pool if host in wanted}
    unwanted = _parse_filter(exclude, pool, "--exclude") if exclude else {}
    left = {host: [s for s in slots if s not in unwanted.get(host, [])] for host, slots in pool.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ValueError(f"--exclude {exclude!r} leaves no slot of {', '.join(pool)}")
    return left


def _parse_filter(text: str, pool: Mapping[str, list[int]], option: str) -> Slots:
    found: Slots = {}
    names = {host.rpartition("@")[2]: host for host in pool}  # the @ of the grammar is not that of user@host
    for term in text.split("@"):
        name, colon, numbers = term.strip().partition(":")
        if name not in names:
            raise ValueError(f"{option} {text!r}: no host {name!r}; there are {', '.join(names)}")
        host = names[name]
        if colon and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise ValueError(f"{option} {text!r}: {numbers!r} is not a list of slots such as 0,2")
        slots = sorted({int(n) for n in numbers.split(",")}) if colon else pool[host]
        if extra := [s for s in slots if s not in pool[host]]:
            raise ValueError(f"{option} {text!r}: host {host} has slots {pool[host]}, not {extra}")
        found[host] = sorted({*found.get(host, []), *slots})
    return found


def expand_nodelist(text: str) -> list[str]:
    """SLURM's `node[01-03,7],gpu2` as host names."""
    names: list[str] = []
    for term in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        names += _expand(term.strip())
    return names


def _expand(term: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", term)
    if match is None:
        return [term]
    numbers: list[str] = []
    for part in match[1].split(","):
        low, _, high = part.partition("-")
        numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
    head, tail = term[: match.start()], term[match.end() :]
    return [name for number in numbers for name in _expand(f"{head}{number}{tail}")]
