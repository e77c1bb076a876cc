"""The slow set is as large as it says."""

from tests.test_models import test_module_properties  # noqa: F401

from . import (  # noqa: F401
    test_checkpoint_properties,
    test_layer_ops_properties,
    test_ops_properties,
    test_options_properties,
)
from .cases import FULL_CASES


def test_ten_thousand_cases():
    assert sum(FULL_CASES.values()) >= 10_000
    assert len({name.rpartition('.')[0] for name in FULL_CASES}) == 5
