"""DDP and FSDP on real processes: every rank has the gradients of one process on the joined batch, or the same error.

torchrun starts `distributed_worker.py` once for each number of ranks; each of its cases is a test here.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support import distributed_worker
from tests.support.processes import ROOT

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
    ),
    pytest.mark.xdist_group("distributed"),  # torchrun starts once for all, not in each of xdist's workers
]

# A central difference has a relative error of some 1e-11 in fp64 and 1e-5 in fp32; the exact methods have that of
# rounding. Under bf16 autocast a gradient is a sum of products of 8 bits, in another order than on one process.
EXACT, DIFFERENCE, SINGLE, HALF = 1e-14, 1e-9, 5e-5, 1e-2

ERRORS = {
    "static_graph": "ValueError: critic must be a DistributedDataParallel without static_graph=True, got one with it: "
    "it takes the input gradient for the whole of the first backward, and would never reduce the weights' gradients",
    "compiled": "ValueError: method='compiled' cannot reach the hooks of DDP and FSDP from inside its graph, got such "
    "a critic: use method='directional', or 'double_backward' under DDP, and leave the call out of torch.compile",
    "sharded twice": "NotTwiceDifferentiable: method='double_backward' must differentiate the critic twice, and "
    "found FSDP, which frees the weights and reduces their gradients in the first backward, that of the input "
    "gradient. Use method='directional'.",
    "sharded chunks": "ValueError: chunk_size must be None under FSDP, whose hooks run in the critic's own backward, "
    "got a number: use method='directional' without it",
}


def expected_error(case):
    """The error that this case must raise, if any."""
    wrapper, _, rest = case.partition(": ")
    if "static_graph" in wrapper:
        return ERRORS["static_graph"]
    if "compiled" in case:
        return ERRORS["compiled"]
    if wrapper.startswith("fsdp") and rest == "double_backward":
        return ERRORS["sharded twice"]
    if wrapper.startswith("fsdp") and rest.startswith("chunks"):
        return ERRORS["sharded chunks"]
    return None


def tolerance(case):
    if "bfloat16" in case:
        return HALF
    if "single precision" in case:
        return SINGLE
    return DIFFERENCE if case.startswith("fsdp") or "directional" in case else EXACT


def torchrun(ranks, *arguments, **options):
    """In a process of its own, on a port of its own; with one thread, since the ranks share the cores."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=environment, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("distributed") / "results.json"
    torchrun(request.param, "--module", "tests.support.distributed_worker", out, cwd=ROOT)
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_gradients_are_those_of_one_process(results, case):
    """The same bits on all ranks, and the same gradients as in one process; or an error at the call, word for word."""
    result = results[case]
    if case == "ddp, compiled by the user":  # the compiler quotes the error
        assert ERRORS["compiled"].removeprefix("ValueError: ") in result["raised"]
    elif (error := expected_error(case)) is not None:
        assert result == {"raised": error}
    elif case == "fsdp2, kinked: auto":
        assert "found FSDP" in result["raised"]
        assert "needs a smooth critic, and found LeakyRelu" in result["raised"]
    else:
        assert result.keys() == {"error", "between ranks"}, result
        assert result["error"] <= tolerance(case)
        assert result["between ranks"] == 0


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_the_example_runs_and_its_ranks_agree(tmp_path, options):
    """It writes its picture and its numbers."""
    program = ROOT / "examples" / "distributed.py"
    done = torchrun(2, program, "--quick", "--out", tmp_path, *options, cwd=tmp_path)
    summary = json.loads((tmp_path / "distributed.json").read_text())
    assert summary["ranks"] == 2
    assert summary["largest_difference_between_ranks"] == 0
    assert "Warning" not in done.stderr
    picture = (tmp_path / "distributed.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
