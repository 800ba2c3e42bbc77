"""Downloads from a server on this machine: whole, interrupted, resumed, of another file."""

import contextlib
import hashlib
import io
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from local_server import serving

from experiment import ExperimentError, download

CONTENT = np.random.default_rng(0).bytes(3 * 2**20 + 12345)
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def server():
    with serving(file=CONTENT) as server:
        yield server


def fetch(server, folder, checksum=CHECKSUM, name="file"):
    return download.download(f"{server.address}/{name}", folder / "there" / "file", checksum)


@pytest.mark.parametrize("checksum", [CHECKSUM, f"md5:{hashlib.md5(CONTENT).hexdigest()}", None])
def test_a_file_comes_whole(server, tmp_path, checksum):
    path = fetch(server, tmp_path, checksum)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert server.asked == [("/file", None)]


@pytest.mark.parametrize("have", [1, 2**20, len(CONTENT) - 1])
def test_an_interrupted_download_goes_on_where_it_ended(server, tmp_path, have):
    part = tmp_path / "there" / "file.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:have])
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/file", f"bytes={have}-")]


def test_a_download_that_was_complete_is_only_checked(server, tmp_path):
    part = tmp_path / "there" / "file.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/file", f"bytes={len(CONTENT)}-")]


def test_a_connection_that_breaks_is_made_again_for_the_rest(server, tmp_path):
    server.breaks = [1000, 2**20]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=1000-", f"bytes={1000 + 2**20}-"]


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    server.ranges, server.breaks = False, [1000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 2


@pytest.mark.parametrize("error", [500, 503, 429])
def test_an_error_that_passes_is_tried_again(server, tmp_path, error):
    server.errors = [error]
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_connection_that_never_holds_is_an_error_and_what_came_is_kept(server, tmp_path):
    server.breaks = [100, 100, 100, 100]
    with pytest.raises(ExperimentError, match=rf"ended after 400 of {len(CONTENT)} bytes.*is kept"):
        fetch(server, tmp_path)
    assert not (tmp_path / "there" / "file").exists()
    assert (tmp_path / "there" / "file.part").read_bytes() == CONTENT[:400]
    assert fetch(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("error", [403, 404])
def test_an_error_that_lasts_is_not_tried_again(server, tmp_path, error):
    server.errors = [error]
    with pytest.raises(ExperimentError, match=f"cannot be downloaded .*{error}"):
        fetch(server, tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize("have", [0, 500, len(CONTENT) + 500])
def test_another_file_is_refused_and_not_continued(server, tmp_path, have):
    part = tmp_path / "there" / "file.part"
    if have:
        part.parent.mkdir()
        part.write_bytes(b"x" * have)
    else:
        server.files["/file"] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    if have > len(CONTENT):  # longer than the file can be: fetched anew
        assert fetch(server, tmp_path).read_bytes() == CONTENT
        return
    with pytest.raises(ExperimentError, match=r"damaged or another file: its sha256 is \w+, not \w+"):
        fetch(server, tmp_path)
    assert list(part.parent.iterdir()) == []


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ExperimentError, match="cannot be downloaded") as raised:
        download.download("http://127.0.0.1:9/file", tmp_path / "file")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "/etc/passwd"])
def test_other_addresses_are_refused(tmp_path, url):
    with pytest.raises(ExperimentError, match="no http or https address"):
        download.download(url, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "there").write_text("a file")
    with pytest.raises(ExperimentError, match="cannot be written"):
        fetch(server, tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_where_downloads_are_told_other_packages_ask_no_server_either(server, tmp_path, capsys, wrapped):
    def build():
        try:
            urllib.request.urlopen(f"{server.address}/file").read()
        except Exception as error:
            if wrapped:
                raise LookupError("not in the cache") from error
            raise

    with download.downloads_told():
        build()
    assert re.fullmatch(r"note: the run would ask \S+ for what is not on this machine\n", capsys.readouterr().out)
    assert server.asked == []
    assert fetch(server, tmp_path).exists()


def test_what_would_be_downloaded_is_said_and_where_it_cannot_be_put_refused(tmp_path, capsys):
    address, reached = "https://nowhere.invalid/net.pth", []
    with download.downloads_told():
        download.download(address, tmp_path / "new" / "net.pth")
        reached.append("behind a download")
    with download.downloads_told(), contextlib.redirect_stdout(io.StringIO()):
        torch.hub.load_state_dict_from_url(address, str(tmp_path))
        reached.append("behind a download of PyTorch's")
    with download.downloads_told():
        reached.append("the end")
    assert reached == ["the end"]
    said = f"note: {address} is not on this machine; the run would download it to {tmp_path}"
    assert capsys.readouterr().out == f"{said}/new/net.pth\n{said}/net.pth\n"
    assert list(tmp_path.iterdir()) == []
    refused = pytest.raises(
        ExperimentError, match=r"/proc/new/net\.pth cannot be written \(.*\), where https:.* belongs"
    )
    with refused, download.downloads_told():
        download.download(address, Path("/proc/new/net.pth"))
