"""The launcher's other half on another host: its share of the job comes on stdin, whose end means stop."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ds_core.cli.launch import Job, run_node
from ds_core.cli.plan import Node


def main() -> int:
    """Run this host's ranks as the first line of stdin says; returns the exit code."""
    said = json.loads(sys.stdin.buffer.readline())
    os.environ.update(said["environ"])
    node, job = Node(**said["node"]), Job(**said["job"])
    if not Path(job.cwd).is_dir():
        sys.stderr.write(
            f"ds launch: no folder {job.cwd} on this host: launch from one that all hosts have\n"
        )
        return 2
    Path(job.logs).mkdir(parents=True, exist_ok=True)
    return run_node(node, job, stop_on_eof=True)


if __name__ == "__main__":
    sys.exit(main())
