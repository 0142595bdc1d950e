"""What the programs behind docs/figures.md share: their options, their JSON, and numbers over several seeds."""

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

# Okabe and Ito's colours, which stay apart for colour-blind eyes; the penalty is always the first.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]


def parse_arguments(description: str, quick: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default 0 1 2)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for picture and JSON (default out)")
    parser.add_argument("--quick", action="store_true", help=quick)
    args = parser.parse_args()
    args.seeds = list(dict.fromkeys(args.seeds))  # one run each
    if args.quick:
        args.seeds = args.seeds[:1]
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # layers this small gain little from a second one, and lose much on a busy machine
    return args


def progress(things: Iterable[T], label: str) -> "tqdm[T]":
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file need not see every frame
    return tqdm(things, label, mininterval=interval, dynamic_ncols=True)


def save_picture(path: Path, figure: Figure, dpi: int = 100) -> None:
    """In a palette of 256 colours, a third of the size."""
    figure.savefig(path, dpi=dpi)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def save(path: Path, summary: dict[str, Any]) -> None:
    versions = {module.__name__: module.__version__ for module in (fused_gp, torch, sklearn, matplotlib)}
    ending = {
        "versions": {"python": platform.python_version()} | versions,
        "processor_seconds": round(time.process_time(), 1),
    }
    path.write_text(json.dumps(summary | ending, indent=1) + "\n")


def over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    low, median, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{median} ({low} to {high})"
