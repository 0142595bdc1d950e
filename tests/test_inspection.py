"""`python -m fused_gp inspect`: its reading of machine code, and its errors."""

import sys

import pytest

from fused_gp.__main__ import main

pytest.importorskip("triton", reason="Triton is not installed")

from fused_gp import kernels


def test_code_is_read_in_the_order_in_which_it_runs():
    """Compilers may place a loop behind the atomic that it runs before."""
    from fused_gp.inspection import _Instruction, _loops_over_tiles, _up_to

    code = [
        _Instruction("s_cbranch_execz", jump=5),
        _Instruction("s_barrier"),
        _Instruction("global_atomic_add"),
        _Instruction("global_load_dword", load=32),
        _Instruction("s_endpgm"),
        _Instruction("global_load_dwordx4", load=128),
        _Instruction("s_cbranch_scc1", jump=5),
        _Instruction("s_branch", jump=1),
        _Instruction("s_endpgm"),
    ]
    before = _up_to(2, code)
    assert [i.text for i in before] == [code[at].text for at in (0, 1, 5, 6, 7)]
    assert [i.load for loop in _loops_over_tiles(before) for i in loop] == [128, 0]
    assert _up_to(None, code) == code


def error_of_inspect(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fused_gp", "inspect", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    return capsys.readouterr().err


def test_unknown_targets_are_named(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    error = error_of_inspect(monkeypatch, capsys, "--target", "sm_90", "sm_91")
    assert "argument --target: must be among sm_75, sm_80" in error
    assert "got sm_91" in error


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    """As they are in this process."""
    assert "TRITON_INTERPRET=1 has them interpreted: unset it" in error_of_inspect(monkeypatch, capsys)
