"""The first phase: what the device is, how fast it copies, and whether the ops are right on it.

python -m benchmarks.gpu.device --device cuda --out FILE
"""

import argparse
import os
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkout, provenance, results, timing
from benchmarks.cases.bytes_moved import copy_bandwidth
from benchmarks.cases.ops import OPS, OpCase
from benchmarks.cases.ours import ours
from benchmarks.correctness import CorrectnessCheck, first_line
from benchmarks.gpu.measure import usable
from benchmarks.names import OURS

# Rows in one program, and split over several; a width that no vector divides.
SHAPES = [(64, 784), (3, 9001)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MATRIX = {"cuda": 8192, "cpu": 256}


def facts(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": provenance.machine(device), "cpus": os.cpu_count()}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}", "processors": properties.multi_processor_count,
            "memory_gb": 1e-9 * properties.total_memory, "cache_mb": 1e-6 * properties.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return found


def matrix_products(device: str) -> dict[str, float]:
    """TFLOP/s, the best of five: with copying, the roof of everything else."""
    size = MATRIX[device]
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = partial(torch.matmul, a, b)
        product()
        best = min(timing.seconds(product, device) for _ in range(5))
        found[str(dtype).removeprefix("torch.")] = 2e-12 * size**3 / best
    return found


def busy_clocks(device: str) -> dict[str, str]:
    """While matrix products run."""
    a = torch.randn(MATRIX[device], MATRIX[device], device=device).bfloat16()
    for _ in range(400 if device != "cpu" else 1):
        a @ a
    return provenance.clocks(device)


def parity(device: str) -> Iterator[dict[str, Any]]:
    """Of every op in every order, the error against fp64, or what went wrong."""
    for name in OPS:
        for dtype in DTYPES:
            for shape in SHAPES:
                case = OpCase(name, shape, dtype)
                try:
                    _, row = CorrectnessCheck(case, case.inputs(device), device).enter(OURS, ours())
                except Exception as failure:
                    traceback.print_exc()
                    row = case.about | {"implementation": OURS, "failed": first_line(failure)}
                yield row | {"suite": "parity"}
                if not usable(device):  # all others would fail too, and hide which one it was
                    return


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.device")
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    checkout.find_kernels()
    device = options.device
    about: dict[str, Any] = provenance.provenance(device) | facts(device)
    measures: dict[str, Callable[[str], Any]] = {
        "clocks": provenance.clocks, "copy_gb_s": copy_bandwidth, "tflops": matrix_products, "busy_clocks": busy_clocks,
    }  # fmt: skip
    for name, measure in measures.items():
        try:
            about[name] = measure(device)
        except Exception as failure:
            traceback.print_exc()
            about[name] = first_line(failure)
        results.save(options.out, [], **about)
        print(f"{name}: {about[name]}", flush=True)
    rows: list[dict[str, Any]] = []
    for row in parity(device):
        rows.append(row)
        results.save(options.out, rows, **about)
    wrong = [row for row in rows if "failed" in row]
    for row in wrong:
        print(f"WRONG: {row['case']} {row['shape']} {row['dtype']}: {row['failed']}", flush=True)
    every = len(OPS) * len(DTYPES) * len(SHAPES)
    print(f"parity: {len(rows) - len(wrong)} of {every} are right")
    return int(len(rows) - len(wrong) < every)


if __name__ == "__main__":
    raise SystemExit(main())
