"""What an import of the package loads, its public names, and the bug report."""

import fused_gp
from tests.support.processes import python_compiled


def test_import_loads_no_triton_and_makes_no_cuda_context():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fused_gp\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "fused_gp.fused_gradient_penalty(lambda x: x.square().sum(1), torch.ones(2, 2), torch.zeros(2, 2))\n"
        "assert 'triton' not in sys.modules and 'fused_gp.kernels' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert loaded <= {'fused_gp'} | set(sys.stdlib_module_names), loaded\n"
    )
    python_compiled("-c", code)


def test_public_names_are_documented():
    for name in fused_gp.__all__:
        assert getattr(fused_gp, name).__doc__
    assert not [name for name in vars(fused_gp.reference) if name.endswith("penalty") and not hasattr(fused_gp, name)]


def test_bug_report_shows_versions_and_parity():
    printed = python_compiled("-m", "fused_gp")
    assert "torch" in printed
    assert "cpu" in printed
    assert "parity passed" in printed
