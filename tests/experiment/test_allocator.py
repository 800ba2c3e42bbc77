import ctypes

import pytest

from experiment import ExperimentError
from experiment.allocator import keep_freed_memory


class Library:
    """A C library that notes how mallopt is called."""

    def __init__(self, answer):
        self.calls = []
        self.answer = answer

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))
        return self.answer


@pytest.mark.parametrize(
    ("variable", "answer", "in_force", "calls"),
    [
        ("default", 1, "default", []),
        # M_MMAP_THRESHOLD is -3 and M_TRIM_THRESHOLD is -1 in glibc's malloc.h.
        (None, 1, "freed memory kept", [(-3, 2**31 - 1), (-1, 2**31 - 1)]),
        (None, 0, "default", [(-3, 2**31 - 1)]),
    ],
)
def test_the_setting_is_said_as_it_is_in_force(monkeypatch, variable, answer, in_force, calls):
    library = Library(answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv("LOWRANK_ALLOCATOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("LOWRANK_ALLOCATOR", variable)
    assert keep_freed_memory() == in_force
    assert library.calls == calls


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.delenv("LOWRANK_ALLOCATOR", raising=False)
    assert keep_freed_memory() == "default"


def test_another_word_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("LOWRANK_ALLOCATOR", "defualt")
    with pytest.raises(ExperimentError, match="LOWRANK_ALLOCATOR is 'defualt'; allowed is default, or leave it out"):
        keep_freed_memory()
