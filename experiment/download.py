"""Downloads that can be interrupted: a `.part` file that grows, is checked, and only then gets its name."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextvars import ContextVar
from email.message import Message
from pathlib import Path
from typing import Any, NoReturn

from experiment.errors import ExperimentError
from experiment.files import try_place

CHUNK = 2**20
_only_told = ContextVar("only told", default=False)  # whether nothing is to be downloaded; see `downloads_told`
WAITS = (1.0, 4.0, 16.0)  # seconds before each further try
TIMEOUT = 60.0  # seconds without a single byte
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
_LASTING = (400, 401, 403, 404, 405, 410, 451)  # HTTP errors that another try does not mend


class _WouldDownload(Exception):
    """Raised in the place of a download."""


@contextlib.contextmanager
def downloads_told() -> Iterator[None]:
    """In this block nothing is downloaded, by `download`, by PyTorch or by other packages, such as Hugging Face's: what
    would be is said, and ends the block.

    Raises:
        ExperimentError: what would be downloaded could not be written.
    """
    from torch import hub  # which takes a second

    before, pytorchs, systems, asked = _only_told.set(True), hub.download_url_to_file, socket.getaddrinfo, list[str]()

    def refuse(host: Any, *_: Any, **__: Any) -> NoReturn:
        asked.append(host.decode(errors="replace") if isinstance(host, bytes) else str(host))
        raise _WouldDownload

    hub.download_url_to_file = lambda url, place, *_, **__: _tell(url, Path(place))
    setattr(socket, "getaddrinfo", refuse)  # noqa: B010 - through which every connection by name goes
    try:
        yield
    except Exception as error:
        if isinstance(error, _WouldDownload) and not asked:
            print(error, flush=True)
        elif asked and not isinstance(error, ExperimentError):  # whatever the package has made of it
            print(f"note: the run would ask {asked[0]} for what is not on this machine", flush=True)
        else:
            raise
    finally:
        hub.download_url_to_file = pytorchs
        setattr(socket, "getaddrinfo", systems)  # noqa: B010
        _only_told.reset(before)


def _tell(url: str, path: Path) -> None:
    try:
        try_place(path.parent)
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written ({error.strerror or error}), where {url} belongs") from None
    raise _WouldDownload(f"note: {url} is not on this machine; the run would download it to {path}")


def download(url: str, path: Path, checksum: str | None = None) -> Path:
    """Download a file; what is there of an interrupted download is kept and continued.

    Args:
        url: an http or https address.
        path: where the file is put once it is whole.
        checksum: "md5:..." or "sha256:..." of the whole file, if it is known.

    Raises:
        ExperimentError: the server cannot be reached or has no such file, or what came is another file.
    """
    if not re.match(r"https?://", url):
        raise ExperimentError(f"{url} is no http or https address")
    if _only_told.get():
        _tell(url, path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for wait in (*WAITS, None):
            try:
                _fetch(url, part)
                break
            except _BROKEN as error:
                if wait is None or getattr(error, "code", None) in _LASTING:
                    raise ExperimentError(
                        f"{url} cannot be downloaded ({error}); what there is of it is kept, so try again later, or "
                        f"download it elsewhere and give the file"
                    ) from None
                print(f"{url}: {error}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
                time.sleep(wait)
        verify(part, checksum, "it was deleted, so download it again", delete=True)
        part.replace(path)
    except OSError as error:
        raise ExperimentError(f"{path} cannot be written ({error.strerror or error})") from None
    return path


def _fetch(url: str, part: Path) -> None:
    """Append to `part` what it lacks."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "Mozilla/5.0", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if _total(error.headers) != have:  # longer than the file there: of another one
            part.unlink()
            raise ConnectionError("the server has a shorter file") from None
        return
    with response:
        begun = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        resumed = response.status == 206 and begun is not None and int(begun[1]) == have
        if response.status == 206 and not resumed:
            raise ConnectionError("the server sent another part than was asked for")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                _show(part.stem, have, total)
    if total is not None and have != total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


def _total(headers: Message) -> int | None:
    found = re.fullmatch(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _show(name: str, have: int, total: int | None) -> None:
    if sys.stderr.isatty():
        share = f"{100 * have / total:.0f} % of {total / 2**20:.0f} MiB" if total else f"{have / 2**20:.0f} MiB"
        print(f"\r{name}: {share}", end="\n" if have == total else "", file=sys.stderr, flush=True)


def verify(path: Path, checksum: str | None, advice: str, delete: bool = False) -> None:
    """Compare a file with its checksum, "md5:..." or "sha256:..."; without one, nothing is compared.

    Raises:
        ExperimentError: it is another file; ends with `advice`. It is deleted first if `delete`.
    """
    if checksum is None:
        return
    kind, _, expected = checksum.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    if found != expected:
        if delete:
            path.unlink()
        raise ExperimentError(f"{path} is damaged or another file: its {kind} is {found}, not {expected}; {advice}")
