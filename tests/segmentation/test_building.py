"""Errors of MMEngine's registries are told from those of code of one's own."""

import pytest
from mmengine.registry import Registry

from experiment import ExperimentError
from segmentation.building import mendable_parts

OWN = Registry("own", scope="mmseg")


@OWN.register_module()
class Broken:
    def __init__(self, key="missing"):
        {}[key]


def test_a_type_or_a_setting_that_there_is_not_is_told():
    with (
        pytest.raises(ExperimentError, match=r"cannot be built: Nope is not in the mmseg::own registry; mend"),
        mendable_parts(),
    ):
        OWN.build({"type": "Nope"})
    with (
        pytest.raises(ExperimentError, match=r"cannot be built: Broken.*unexpected keyword argument 'nope'; mend"),
        mendable_parts(),
    ):
        OWN.build({"type": "Broken", "nope": 1})


def test_an_error_in_code_of_ones_own_or_while_nothing_is_built_stays_what_it_is():
    with pytest.raises(KeyError, match="missing"), mendable_parts():
        OWN.build({"type": "Broken"})
    with pytest.raises(TypeError), mendable_parts():
        OWN.switch_scope_and_registry()
