"""YAML that no one means is refused in one line; what is meant is let pass."""

import pytest
import yaml

from experiment import ExperimentError
from experiment.strict_yaml import MOST_VALUES, check_yaml, check_yaml_file, misread_number

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' twice, again in line 3"),
        ("a: {b: 1, 'b': 2}", "the key 'b' twice"),
        ("- {a: 1}\n- {a: 1, a: 2}\n", "twice"),
        ("a: 1:30\n", "1:30 in line 1, which YAML takes for a number to the base of 60"),
        ("a:\n  - 0100\n", "0100 in line 2, which YAML takes for a number to the base of 8"),
        ("a: -12:30:45.5", "60"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        (BOMB, f"more than {MOST_VALUES} values"),
        ("a: &a [*a]", "a value that holds it"),
        ("a: *b", "or of none"),
    ],
)
def test_what_no_one_means_is_refused(text, message):
    with pytest.raises(ExperimentError, match=r"^here ") as raised:
        check_yaml(text, "here", aliases=True)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        *("a: {b: 1}\nb: {b: 2}", "[a, a, a]", "? [a]\n: a\n", "", "a: '1:30'", 'a: "0100"', "a: 0", "a: 0.5"),
        *("a: 00:01:30:00", "a: !!str 0100", "a: 10", "a: &x [1]\nb: *x\nc: *x", "a: x1:30", "a: 0x10"),
    ],
)
def test_what_is_meant_passes(text):
    check_yaml(text, "here", aliases=True)
    with_alias = "*" in text
    if with_alias:
        with pytest.raises(ExperimentError, match=r"has the alias \*x; write out what it stands for"):
            check_yaml(text, "here")


def test_what_is_no_yaml_is_left_to_the_parser():
    for text in ("a: [1,", "a: 'x", "\t", "a: b: c", "%"):
        check_yaml(text, "here")
        with pytest.raises(yaml.YAMLError):
            yaml.safe_load(text)


@pytest.mark.parametrize("text", ["1:30", "0100", "190:20:30", "+0_17", "1:2.5", "12", "1e3", "09", "0", "1:61", "abc"])
def test_numbers_of_another_base_are_those_that_pyyaml_reads_so(text):
    value = yaml.safe_load(text)
    plain = text.lstrip("+-").replace("_", "")
    try:
        in_ten = float(plain)
    except ValueError:
        in_ten = None
    other_base = isinstance(value, int | float) and value != in_ten
    assert (misread_number(text) is not None) == other_base


def test_a_file_is_of_text_and_of_bounded_size(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ExperimentError, match=r"is no UTF-8 \(invalid start byte at byte 3\)"):
        check_yaml_file(path)
    path.write_bytes(b"a: " + b"x" * 2**20)
    with pytest.raises(ExperimentError, match="has 1048579 bytes; allowed are 1048576"):
        check_yaml_file(path)
    with pytest.raises(ExperimentError, match="cannot be read"):
        check_yaml_file(tmp_path)


@pytest.mark.parametrize("text", ["a: [1,", "a: 'x", "\t", "a: b: c", "%", "a: 1\n b: 2", "\x00", "{"])
def test_a_file_that_is_no_yaml_is_named(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ExperimentError, match=rf"^config {path} is no YAML: ") as raised:
        check_yaml_file(path)
    assert "\n" not in str(raised.value)
