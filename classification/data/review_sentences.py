"""Sentences of film reviews, each with the mean rating of twenty people from -4 to 4 (Hutto and Gilbert, ICWSM 2014).

10,605 sentences from reviews on rotten tomatoes (Pang and Lee 2005), in `movieReviewSnippets_GroundTruth.txt`, a line
each: number, mean rating, sentence. They come with the source distribution of the package vaderSentiment 3.3.2 (MIT).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from classification.data.files import hold_out
from classification.data.registry import Archive, Source, Splits, TextSet, dataset, source
from experiment import fingerprint

FOLDER, FILE = "hutto_ICWSM_2014", "movieReviewSnippets_GroundTruth.txt"
MOST = 4.0  # a rating's size
DECIDED = 0.5  # nearer to 0, a mean of twenty ratings tells no side: its standard error is about 0.3
CHECKSUM = "sha256:c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
PACKED = "sha256:d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
DISTRIBUTION = "sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INSIDE = f"vaderSentiment-3.3.2/additional_resources/{FOLDER}.tar.gz"

source("review_sentences")(
    Source(
        folder=FOLDER,
        archives=(Archive("vaderSentiment-3.3.2.tar.gz", DISTRIBUTION, None, inside=INSIDE),),
        instead=(
            Archive(f"{FOLDER}.tar.gz", PACKED, None),
            Archive(FILE, CHECKSUM, None, FOLDER, unpack=False),
        ),
        classes=2,
        train=8_056,
        test=2_014,
        most_bytes=2**26,
        checksums=((FILE, CHECKSUM),),
        terms="fetch it with: pip download --no-deps --no-binary :all: vaderSentiment==3.3.2",
    )
)


def _rated(path: Path) -> Iterator[tuple[float, str]]:
    """Rating and sentence of every line.

    Raises:
        OSError: the file is missing.
        ValueError: a line is not as published.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split("\t")
        try:
            count, rating, sentence = int(parts[0]), float(parts[1]), parts[2].strip()
        except (ValueError, IndexError):
            raise ValueError(f"{path.name}, line {number} is no number, rating and sentence") from None
        if len(parts) != 3 or count != number or not abs(rating) <= MOST or not sentence:
            raise ValueError(f"{path.name}, line {number} is no number {number}, rating from -4 to 4 and sentence")
        yield rating, sentence


@dataset("review_sentences")
def review_sentences(root: Path) -> Splits:
    """Negative or positive: at least 0.5 from 0; others, and sentences that were there before, are left out.

    A fifth of each class tests, and a fifth of each class of the rest validates.
    """
    labels: dict[str, int] = {}
    for rating, sentence in _rated(root / FOLDER / FILE):
        if abs(rating) >= DECIDED:
            labels.setdefault(sentence, int(rating > 0))
    whole = TextSet(list(labels), np.array(list(labels.values()), np.int64))
    rest, test = hold_out(whole, stratified=True)
    content = ["\n".join(whole.texts).encode(), whole.labels.tobytes()]
    return Splits(*hold_out(rest, stratified=True), test, ("negative", "positive"), fingerprint(content))
