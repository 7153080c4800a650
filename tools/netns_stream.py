"""One end of the TCP stream by which `netns.py` measures a link; the receiver prints JSON."""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time

_TRIPS = 20


def stream(role: str, host: str, port: int, nbytes: int) -> None:
    """One end of a TCP stream; the receiver prints what it saw as JSON."""
    if role == "send":
        with _connect(host, port) as peer:
            for _ in range(_TRIPS):
                peer.sendall(b"?")
                peer.recv(1)
            block = bytes(1 << 20)
            while nbytes > 0:
                peer.sendall(block[: min(nbytes, len(block))])
                nbytes -= len(block)
        return
    with socket.create_server((host, port)) as server:
        peer, _ = server.accept()
    with peer:
        trips, room = [], bytearray(1 << 20)
        for number in range(_TRIPS):
            began = time.perf_counter()
            peer.recv(1)
            if number:  # from our answer to the next question
                trips.append(time.perf_counter() - began)
            peer.sendall(b"!")
        peer.recv_into(room)  # the clock starts with the first bytes, which a burst let through
        began, total = time.perf_counter(), 0
        while got := peer.recv_into(room):
            total += got
        spent = time.perf_counter() - began
    print(json.dumps({"bytes": total, "seconds": spent, "round_trip": statistics.median(trips)}))


def _connect(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((host, port), timeout=30)
        except ConnectionRefusedError:  # the receiver is still starting
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


if __name__ == "__main__":
    stream(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
