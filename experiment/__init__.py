"""What every run shares, whatever its task: its folder, its record, and where its numbers come from."""

from experiment.errors import ExperimentError
from experiment.folder import RunFolder, Status
from experiment.plan import add_planned, find_planned
from experiment.provenance import fingerprint, provenance
from experiment.record import Record, Run

__all__ = [
    "ExperimentError",
    "Record",
    "Run",
    "RunFolder",
    "Status",
    "add_planned",
    "find_planned",
    "fingerprint",
    "provenance",
]
