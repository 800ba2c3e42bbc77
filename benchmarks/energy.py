"""Energy of the machine while something runs, where it has a meter: Intel/AMD RAPL or an INA3221 (Jetson boards)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SYSFS = Path("/sys")
SAMPLING = 0.01  # seconds between readings of an INA3221, which gives power and not energy


class Reading:
    """Joules used inside a `measured` block; None where the machine has no meter that may be read."""

    joules: float | None = None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None  # RAPL can be read by root only on many systems


def rapl_packages(sysfs: Path = SYSFS) -> list[Path]:
    """Folders of the processor packages whose energy counter may be read."""
    folders = sorted((sysfs / "class" / "powercap").glob("intel-rapl:*"))
    return [folder for folder in folders if folder.name.count(":") == 1 and _number(folder / "energy_uj") is not None]


def ina3221_rails(sysfs: Path = SYSFS) -> list[tuple[Path, Path]]:
    """Files of voltage (mV) and current (mA) of every rail of the power monitors."""
    rails = []
    for folder in sorted((sysfs / "class" / "hwmon").glob("hwmon*")):
        name = folder / "name"
        if name.exists() and name.read_text().strip() == "ina3221":
            for current in sorted(folder.glob("curr*_input")):
                voltage = folder / current.name.replace("curr", "in")
                if _number(current) is not None and _number(voltage) is not None:
                    rails.append((voltage, current))
    return rails


def meter_name(sysfs: Path = SYSFS) -> str:
    """Which meter `measured` reads: "rapl", "ina3221" or "absent"."""
    return "rapl" if rapl_packages(sysfs) else "ina3221" if ina3221_rails(sysfs) else "absent"


@contextmanager
def measured(sysfs: Path = SYSFS) -> Iterator[Reading]:
    """Energy of the whole machine (RAPL: of its processors) from the start to the end of the block."""
    reading = Reading()
    packages, rails = rapl_packages(sysfs), ina3221_rails(sysfs)
    if packages:
        before = [_number(folder / "energy_uj") or 0.0 for folder in packages]
        yield reading
        reading.joules = sum(_used(folder, start) for folder, start in zip(packages, before, strict=True)) / 1e6
    elif rails:
        with _Sampler(rails) as sampler:
            yield reading
        reading.joules = sampler.joules
    else:
        yield reading


def _used(folder: Path, before: float) -> float:
    used = (_number(folder / "energy_uj") or 0.0) - before
    return used if used >= 0 else used + (_number(folder / "max_energy_range_uj") or 0.0)  # the counter went round


class _Sampler(threading.Thread):
    """Integrates the power of rails over time."""

    def __init__(self, rails: list[tuple[Path, Path]]) -> None:
        super().__init__(daemon=True)
        self.rails, self.joules, self.ended = rails, 0.0, threading.Event()

    def _watts(self) -> float:
        return sum((_number(voltage) or 0.0) * (_number(current) or 0.0) for voltage, current in self.rails) / 1e6

    def __enter__(self) -> _Sampler:
        self.last, self.watts = time.perf_counter(), self._watts()
        self.start()
        return self

    def _sample(self) -> None:
        now, watts = time.perf_counter(), self._watts()
        self.joules += (now - self.last) * (self.watts + watts) / 2
        self.last, self.watts = now, watts

    def run(self) -> None:
        """Sample until the block ends."""
        while not self.ended.wait(SAMPLING):
            self._sample()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()
        self._sample()
