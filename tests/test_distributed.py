"""DDP and FSDP on real processes: every rank's gradients are those of one process on the joined batch, or an error.

torchrun starts `distributed_worker.py` once for each number of ranks; each of its cases is a test here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import distributed_worker

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
    ),
    pytest.mark.xdist_group("distributed"),  # one start of torchrun for all of them, not one in each of xdist's workers
]

# A central difference in fp64 is off by some 1e-11, in fp32 by 1e-5; the exact methods by rounding. Under bf16
# autocast a gradient is a sum of products with 8 bits, in another order than on one process.
EXACT, DIFFERENCE, SINGLE, HALF = 1e-14, 1e-9, 5e-5, 1e-2

REFUSED = {
    "static_graph": "ValueError: critic must be a DistributedDataParallel without static_graph=True, got one with it: "
    "it takes the input gradient for the whole of the first backward, and would never reduce the weights' gradients",
    "compiled": "ValueError: method='compiled' cannot reach the hooks of DDP and FSDP from inside its graph, got such "
    "a critic: use method='directional', or 'double_backward' under DDP, and leave the call out of torch.compile",
    "sharded twice": "NotTwiceDifferentiable: method='double_backward' must differentiate the critic twice, and "
    "found FSDP, which frees the weights and reduces their gradients in the first backward, that of the input "
    "gradient. Use method='directional'.",
    "sharded chunks": "ValueError: chunk_size must be None under FSDP, whose hooks run in the critic's own backward, "
    "got one: use method='directional' without it",
}


def refusal(case):
    """The error that this case is to end in."""
    wrapper, _, rest = case.partition(": ")
    if "static_graph" in wrapper:
        return REFUSED["static_graph"]
    if "compiled" in case:
        return REFUSED["compiled"]
    if wrapper.startswith("fsdp") and rest == "double_backward":
        return REFUSED["sharded twice"]
    if wrapper.startswith("fsdp") and rest.startswith("chunks"):
        return REFUSED["sharded chunks"]
    return None


def tolerance(case):
    if "bfloat16" in case:
        return HALF
    if "single precision" in case:
        return SINGLE
    return DIFFERENCE if case.startswith("fsdp") or "directional" in case else EXACT


def torchrun(ranks, program, *arguments, **options):
    """In a process of its own, on a port of its own; one thread, since the ranks share the cores."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(program), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=environment, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def findings(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("distributed") / "findings.json"
    torchrun(request.param, ROOT / "tests" / "distributed_worker.py", out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_case(findings, case):
    """The same on all ranks to the last bit, and as in one process; or refused at the call, and in which words."""
    found = findings[case]
    if case == "ddp, compiled by the user":  # the compiler puts our words among its own
        assert REFUSED["compiled"].removeprefix("ValueError: ") in found["raised"]
    elif (expected := refusal(case)) is not None:
        assert found == {"raised": expected}
    elif case == "fsdp2, kinked: auto":
        assert "found FSDP" in found["raised"]
        assert "needs a smooth critic, and found LeakyRelu" in found["raised"]
    else:
        assert found.keys() == {"off", "apart"}, found
        assert found["off"] <= tolerance(case)
        assert found["apart"] == 0


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_example(tmp_path, options):
    """It runs, leaves picture and numbers, and its ranks agree."""
    program = ROOT / "examples" / "distributed.py"
    done = torchrun(2, program, "--quick", "--out", tmp_path, *options, cwd=tmp_path)
    summary = json.loads((tmp_path / "distributed.json").read_text())
    assert summary["ranks"] == 2
    assert summary["largest_difference_between_ranks"] == 0
    assert "Warning" not in done.stderr
    picture = (tmp_path / "distributed.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
