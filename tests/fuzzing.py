"""What the fuzzing tests share: JSON of any kind, damage to bytes, and how much is tried."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Some seconds of examples.
SECONDS = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 2**63, 2**70, 10**400, 1e308, -0.0, True, False, None])
)
NAMES = st.one_of(st.text(max_size=5), st.sampled_from(["", "..", "/", "a/b", "a\0", "\ud800", "all", "__class__"]))
ANYTHING = st.recursive(
    st.one_of(NUMBERS, NAMES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def edited(draw: st.DrawFn, good: Any) -> Any:
    """JSON content with one to three places in it replaced by anything, removed, or added to."""
    content = good
    for _ in range(draw(st.integers(1, 3))):
        content = _edited(draw, content)
    return content


def _edited(draw: st.DrawFn, content: Any) -> Any:
    if not isinstance(content, dict | list) or not content or draw(st.integers(0, 4)) == 0:
        return draw(ANYTHING)
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = draw(st.sampled_from(keys))
    changed: Any = dict(content) if isinstance(content, dict) else list(content)
    how = draw(st.sampled_from(["inside", "inside", "remove", "add"]))
    if how == "inside":
        changed[key] = _edited(draw, content[key])
    elif how == "remove":
        del changed[key]
    elif isinstance(changed, dict):
        changed[draw(NAMES)] = draw(ANYTHING)
    else:
        changed.append(draw(ANYTHING))
    return changed


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes cut, flipped in up to three places, with a piece doubled or put in; or others altogether."""
    content = bytearray(good)
    how = draw(st.sampled_from(["cut", "flip", "flip", "insert", "double", "other"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return bytes(content[:place])
    if how == "insert":
        return bytes(content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:])
    if how == "double":
        return bytes(content[:place] + content[place // 2 :])
    if how == "other":
        return draw(st.binary(max_size=64))
    for _ in range(draw(st.integers(1, 3))):
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    return bytes(content)


def assert_told(error: Exception, where: object) -> None:
    """An error is one line that names the place."""
    assert str(where) in str(error)
    assert len(str(error).splitlines()) == 1
