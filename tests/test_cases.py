"""The slow set is as large as it says."""

import tests.test_checkpoint.test_properties
import tests.test_models.test_module_properties
import tests.test_models.test_options_properties
import tests.test_ops.cross_scan.test_properties
import tests.test_ops.fused.layer_norm.test_properties
import tests.test_ops.fused.test_properties
import tests.test_ops.selective_scan.test_properties
import tests.test_ops.ss2d.test_properties
import tests.test_ops.ssd_scan.test_properties  # noqa: F401
from tests.cases import FULL_CASES


def test_ten_thousand_cases():
    assert sum(FULL_CASES.values()) >= 10_000
    assert len({name.rpartition('.')[0] for name in FULL_CASES}) == 9
