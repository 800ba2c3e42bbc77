"""A miniature's archives on a server of this machine, and `prepare` told to expect just them."""

from __future__ import annotations

from dataclasses import replace

from miniatures import CLASSES, TEST, TRAIN, checksum, official, write_archives

from classification.data.registry import source
from classification.prepare import main

TOTALS = [TRAIN * CLASSES, TEST * CLASSES]


class Published:
    """A miniature's archives, on a server, and `prepare` told to expect just them."""

    def __init__(self, name, folder, server, monkeypatch):
        self.name, self.folder, self.server, self.monkeypatch = name, folder, server, monkeypatch
        write_archives(name, folder)
        self.source = official(name, folder, server.address)
        self.serve()

    def serve(self):
        """Serve the archives as they are now, and expect their checksums."""
        names = [archive.name for archive in self.source.archives]
        self.server.files = {f"/{name}": (self.folder / name).read_bytes() for name in names}
        self.source = replace(
            self.source,
            archives=tuple(
                replace(archive, checksum=checksum(self.folder / archive.name)) for archive in self.source.archives
            ),
        )
        self.monkeypatch.setitem(source.entries, self.name, self.source)

    def expect(self, **changes):
        """Expect something else."""
        self.source = replace(self.source, **changes)
        self.monkeypatch.setitem(source.entries, self.name, self.source)

    @property
    def archives(self):
        """Paths of the archives."""
        return [self.folder / archive.name for archive in self.source.archives]


def prepare(name, root, *options):
    return main([name, "--root", str(root), *map(str, options)])


def refused(capsys, name, root, message, *options):
    """Nothing is prepared, in one line; what is left below `root` are downloads only."""
    capsys.readouterr()
    assert prepare(name, root, *options) == 2
    *tries, printed = capsys.readouterr().err.splitlines()
    assert all("; trying again in " in line for line in tries)
    assert printed.startswith("error: ")
    assert message in printed
    assert not (root / f"{name}.prepared.json").exists()
    assert {path.name for path in root.iterdir()} <= {".downloads", f".{name}.lock"} if root.is_dir() else True
    return printed


def totals(splits):
    return [len(splits.train.labels) + len(splits.val.labels), len(splits.test.labels)]
