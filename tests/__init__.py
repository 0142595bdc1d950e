"""The tests mirror the package: those of fused_gp/methods/chunks.py are in tests/methods/test_chunks.py."""

import pytest

pytest.register_assert_rewrite("tests.support")  # so that failed assertions of helpers show their values too
