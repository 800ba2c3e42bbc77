"""`python -m classification prepare NAME`: download a data set, check it, unpack it, and note that it is ready.

A data set is there as a whole or not at all: it is unpacked beside its place, compared with its official numbers of
classes and images, and only then moved into place. An interrupted download goes on where it ended.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classification.data.prepared import DAMAGED, Mark, load_splits, read
from classification.data.registry import Archive, Source, Splits, source
from classification.options import prepare_parser
from experiment import ExperimentError
from experiment.archives import unpack
from experiment.command import Work, finish
from experiment.download import download, verify
from experiment.errors import InUseError
from experiment.files import beside, file_lock


@dataclass(frozen=True)
class Preparation:
    """One data set to prepare.

    Attributes:
        name: of the data set.
        root: folder that holds all data sets.
        given: archives, or folders that hold them or the data set itself, that the user has already.
    """

    name: str
    root: Path
    given: tuple[Path, ...] = ()

    @property
    def source(self) -> Source:
        """Where the data set comes from."""
        return source.find(self.name)

    @property
    def folder(self) -> Path:
        """Where the data set belongs."""
        return self.root / self.source.folder

    @property
    def _at_work(self) -> Path:
        """What the lock is named by, and what is being made: the folder may belong below one that is not there yet."""
        return self.root / self.name

    def run(self) -> Splits:
        """Make the data set ready, unless it is.

        Raises:
            ExperimentError: an archive is missing, damaged or refused, or the data set is not the official one.
        """
        given = self._given_folder()
        mark = Mark.of(self.name, self.root)
        with self._lock():
            if mark.path.exists() and self.folder.exists():
                return load_splits(self.name, self.root)
            existing = self.folder if self.folder.exists() else given
            splits = self._adopt(existing) if existing else self._unpack()
            mark.write(splits)
        return splits

    def _given_folder(self) -> Path | None:
        """A folder that the user gave and that holds the data set, not its archives."""
        known = (*self.source.archives, *self.source.instead)
        names = {archive.name for archive in known}
        for path in self.given:
            if not path.exists():
                raise ExperimentError(f"--from {path} is not there")
            if path.is_file() and path.name not in names:
                raise ExperimentError(
                    f"--from {path} is no archive of {self.name}; allowed: {', '.join(sorted(names))}"
                )
        packed = [archive.name for archive in known if archive.unpack]
        for path in self.given:
            if path.is_dir() and not any((path / name).exists() for name in packed):
                below = path / self.source.folder
                return below if below.is_dir() else path
        return None

    def _adopt(self, existing: Path) -> Splits:
        """Check a folder that is there already, and link to it if it is elsewhere."""
        if existing == self.folder:
            try:
                return self._checked(self.root)
            except ExperimentError as error:
                raise ExperimentError(f"{existing} is there already, but: {error}") from None
        with beside(self._at_work) as temporary:
            link = temporary / self.source.folder
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(existing.resolve())
            splits = self._checked(temporary)
            self._place(link)
        return splits

    def _unpack(self) -> Splits:
        """From archives to the data set in its place."""
        alone = [archive for archive in self.source.instead if self._given_file(archive) is not None]
        archives = [(archive, self._fetched(archive)) for archive in alone[:1] or self.source.archives]
        with beside(self._at_work) as temporary:
            for archive, path in archives:
                target = temporary / archive.into
                if archive.unpack:
                    unpack(path, target, self.source.most_bytes)
                    if archive.inside is not None:
                        unpack(target / archive.inside, target, self.source.most_bytes)
                else:
                    target.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target / archive.name)
            splits = self._checked(temporary, unpacked=True)
            self._place(temporary / self.source.folder)
        shutil.rmtree(self._downloads, ignore_errors=True)
        return splits

    def _place(self, ready: Path) -> None:
        """Move what is ready to where it belongs, which may be below a folder that is not there yet."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        ready.rename(self.folder)

    @property
    def _downloads(self) -> Path:
        return self.root / ".downloads" / self.name

    def _given_file(self, archive: Archive) -> Path | None:
        """The archive among what the user gave."""
        places = (path / archive.name if path.is_dir() else path for path in self.given)
        return next((place for place in places if place.name == archive.name and place.is_file()), None)

    def _fetched(self, archive: Archive) -> Path:
        """The archive on this machine, its checksum compared."""
        found = self._given_file(archive)
        if found is not None:
            verify(found, archive.checksum, "fetch it again")
            return found
        if archive.url is None:
            names = " ".join(one.name for one in self.source.archives)
            raise ExperimentError(
                f"{archive.name} cannot be downloaded from here: {self.source.terms}; then run: python -m "
                f"classification prepare {self.name} --root {self.root} --from FOLDER, where FOLDER holds {names}"
            )
        path = self._downloads / archive.name
        if path.exists():
            verify(path, archive.checksum, "it was deleted, so run the command again", delete=True)
            return path
        print(f"downloading {archive.url}", flush=True)
        return download(archive.url, path, archive.checksum)

    def _checked(self, root: Path, unpacked: bool = False) -> Splits:
        """The data set below `root`, compared with what it has to be."""
        expected = self.source
        folder = root / expected.folder
        for name, checksum in expected.checksums:
            if not (folder / name).is_file():
                raise ExperimentError(f"data set {self.name} lacks the file {name}")
            verify(folder / name, checksum, "fetch the data set again")
        if unpacked and expected.arrange is not None:
            try:
                expected.arrange(folder)
            except DAMAGED as error:
                raise ExperimentError(f"the archives of {self.name} do not fit together ({error})") from None
        splits = read(self.name, root)
        train, test = np.concatenate([splits.train.labels, splits.val.labels]), splits.test.labels
        found = (len(splits.classes), len(np.unique(train)), len(train), len(np.unique(test)), len(test))
        if found != (expected.classes, expected.classes, expected.train, expected.classes, expected.test):
            raise ExperimentError(
                f"{self.name} is not whole: it has {found[2]} + {found[4]} {splits.kind} of {found[1]} and {found[3]} "
                f"classes; it is to have {expected.train} + {expected.test} of {expected.classes}"
            )
        return splits

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(self._at_work, wait=False))
            except BlockingIOError:
                raise InUseError(f"another process is preparing {self.name} in {self.root}; wait for it") from None
            except OSError as error:
                raise ExperimentError(
                    f"{self.root} cannot be written ({error.strerror}); give another --root"
                ) from None
            yield


def main(arguments: Sequence[str]) -> int:
    """Prepare a data set. Returns the exit code; see `experiment.command.finish`."""
    return finish(lambda work: _prepare(arguments, work))


def _prepare(arguments: Sequence[str], work: Work) -> None:
    work.title = "prepare"
    options = prepare_parser().parse_args(arguments)
    splits = Preparation(options.name, options.root, tuple(options.given)).run()
    sizes = " + ".join(str(len(part.labels)) for part in (splits.train, splits.val, splits.test))
    print(
        f"{options.name} is ready: {len(splits.classes)} classes, {sizes} {splits.kind} to train, validate and test on"
    )
