"""A server of files on this machine, which can break off, ignore ranges, or answer with an error."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """What a server has and does.

    Attributes:
        files: content by path, such as "/a.tar".
        ranges: whether it sends a part of a file when asked to.
        breaks: for each of the next answers, after how many bytes the connection ends.
        errors: HTTP errors of the next answers.
        asked: path and Range header of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one GET."""
        asked = request.headers.get("Range")
        self.asked.append((request.path, asked))
        content = self.files.get(request.path.partition("?")[0])
        if self.errors or content is None:
            request.send_error(self.errors.pop(0) if self.errors else 404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if start and start >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        request.wfile.write(content[start:][: self.breaks.pop(0) if self.breaks else None])


@contextlib.contextmanager
def serving(**files: bytes) -> Iterator[Server]:
    """A server of these files while the block runs."""
    server = Server({f"/{name}": content for name, content in files.items()})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.address = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
