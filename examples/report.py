"""Shared by the programs behind docs/figures.md: command-line options, JSON output, statistics over seeds."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import sklearn
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import fused_gp

T = TypeVar("T")

# The Okabe-Ito palette, safe for colour-blind readers. The penalty always has the first colour.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]


def parse_arguments(description: str, quick_help: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds, one run each (default 0 1 2)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="output folder for the picture and the JSON (default out)"
    )
    parser.add_argument("--quick", action="store_true", help=quick_help)
    args = parser.parse_args()
    args.seeds = list(dict.fromkeys(args.seeds))  # without duplicates
    if args.quick:
        args.seeds = args.seeds[:1]
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small layers gain little from a second thread and lose much on a busy machine
    return args


def progress(items: Iterable[T], label: str) -> "tqdm[T]":
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; fewer updates in a log file
    return tqdm(items, label, mininterval=interval, dynamic_ncols=True)


def save_picture(path: Path, figure: Figure, dpi: int = 100) -> None:
    """As a PNG with a palette of 256 colours, a third of the size."""
    figure.savefig(path, dpi=dpi)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def save_json(path: Path, summary: dict[str, Any]) -> None:
    versions = {module.__name__: module.__version__ for module in (fused_gp, torch, sklearn, matplotlib)}
    run_info = {
        "versions": {"python": platform.python_version()} | versions,
        "processor_seconds": round(time.process_time(), 1),
    }
    path.write_text(json.dumps(summary | run_info, indent=1) + "\n")


def median_and_range(values: Sequence[float], digits: int = 2) -> str:
    """As in the tables: median (minimum to maximum)."""
    low, median, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{median} ({low} to {high})"
