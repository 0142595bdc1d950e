"""The rows of one small case, measured."""

import pytest

from benchmarks import provenance, runner
from benchmarks.cases.ops import OpCase
from benchmarks.cases.ours import ours
from benchmarks.names import BOTH, OURS
from benchmarks.peers import PEERS

SMALL = OpCase(BOTH, (8, 12))


def small_run():
    implementations = {OURS: ours(), "snippet": PEERS["snippet"], "tidy": PEERS["tidy"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpCase, "implementations", lambda case: implementations)
        found = runner.measure(SMALL, "cpu", 0.0, 9, copy_gb_s=10.0)
    return [row | provenance.provenance("cpu") for row in found]
