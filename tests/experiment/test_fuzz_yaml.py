"""Any text as a config: checked without an error of a foreign kind, and read by YAML as the check has said."""

import time

import yaml
from fuzzing import SECONDS, assert_told, damaged
from hypothesis import given
from hypothesis import strategies as st

from experiment import ExperimentError
from experiment.strict_yaml import check_yaml, check_yaml_file

GOOD = b"model:\n  layers: 2\n  budget: {mib: 1.5, table: 'x.json'}\ndata:\n- &a [1, 2]\n- *a\n- !!str 1:30\n# end\n"
PIECES = ["a", ": ", "\n", "  ", "- ", "[", "]", "{", "}", "&a ", "*a", "1:30", "0100", "'", '"', "!!map ", "? ", "|\n"]


def has_other_base(value):
    if isinstance(value, dict):
        return any(map(has_other_base, [*value, *value.values()]))
    return any(map(has_other_base, value)) if isinstance(value, list) else value in (90, 64)


@SECONDS
@given(text=st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_any_text_is_checked_and_no_number_of_another_base_passes(text):
    try:
        check_yaml(text, "here", aliases=True)
    except ExperimentError as error:
        assert_told(error, "here ")
        return
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError):  # the parser says it
        return
    assert not has_other_base(value)


@SECONDS
@given(content=damaged(GOOD))
def test_a_damaged_file_is_checked_soon(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    start = time.process_time()
    try:
        check_yaml_file(path, aliases=True)
    except ExperimentError as error:
        assert_told(error, path)
    assert time.process_time() - start < 5
