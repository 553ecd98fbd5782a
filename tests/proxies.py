"""What may stand between a program and its server, and what it does to the answers."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType

HTML = b"<html><body>somebody else</body></html>"
#: What a proxy does in place of passing a request on and its answer back.
TROUBLES = (
    *(f"answers {code}" for code in (400, 401, 403, 404, 408, 413, 429, 500, 502, 503, 504)),
    "answers 200 with nothing",
    "answers 200 with {}",
    "answers 200 with HTML",
    "hangs",
    "resets",
    "passes on and hangs",
    "passes on and resets",
    "passes on and cuts the answer",
)


class Proxy:
    """Passes HTTP on to a port of this machine, as long as :attr:`trouble` is None.

    Attributes:
        trouble: one of :data:`TROUBLES`, or None; may change at any time.
        met: the number of requests that met a trouble.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.trouble: str | None = None
        self.met = 0
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._open: set[socket.socket] = set()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listening.close()
        for connection in list(self._open):
            connection.close()

    def troubled(self, rng: random.Random, longest: float) -> Callable[[], None]:
        """Random troubles for random spans, with peace between them, until the returned function is called."""
        over = threading.Event()

        def change() -> None:
            while not over.is_set():
                self.trouble = None if self.trouble else rng.choice(TROUBLES)
                over.wait(rng.uniform(0, longest))
            self.trouble = None

        thread = threading.Thread(target=change, daemon=True)
        thread.start()

        def end() -> None:
            over.set()
            thread.join()

        return end

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._open.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                self._answer(connection, *_read_request(connection))
        finally:
            self._open.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        trouble = self.trouble
        self.met += trouble is not None
        if trouble is None or trouble.startswith("passes on"):
            answer = self._pass_on(method, path, headers, body)
        else:
            answer = b""
        if trouble is None:
            connection.sendall(answer)
        elif trouble.endswith("hangs"):
            while self.trouble == trouble:
                time.sleep(0.05)
        elif trouble.endswith("resets"):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif trouble.endswith("cuts the answer"):
            connection.sendall(answer[: len(answer) - 1 - len(answer) // 10])
        else:
            code = int(trouble.split()[1])
            content = {"with nothing": b"", "with {}": b"{}"}.get(trouble.partition("200 ")[2], HTML)
            kind = "application/json" if content == b"{}" else "text/html"
            connection.sendall(_response(code, kind, content))

    def _pass_on(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        server = http.client.HTTPConnection("127.0.0.1", self._target, timeout=60)
        try:
            server.request(method, path, body, headers)
            found = server.getresponse()
            return _response(found.status, found.headers.get("Content-Type", "application/json"), found.read())
        finally:
            server.close()


def _read_request(connection: socket.socket) -> tuple[str, str, dict[str, str], bytes]:
    file = connection.makefile("rb")
    method, path, _ = file.readline().decode().split()
    headers = {}
    while line := file.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    body = file.read(int(headers.get("content-length", 0)))
    kept = {name: value for name, value in headers.items() if name not in ("connection", "host", "transfer-encoding")}
    return method, path, kept, body


def _response(code: int, kind: str, content: bytes) -> bytes:
    head = f"HTTP/1.1 {code} {http.client.responses.get(code, 'Unknown')}\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content
