"""Where, when and with what a row was measured: its provenance, and the machine."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def provenance(device: str) -> dict[str, str | float]:
    return {
        "device": device,
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy", "fused_gp"))
        + f", Python {platform.python_version()}",
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 1),  # of the last minute, before the first case
    }


def machine(device: str) -> str:
    if device != "cpu":
        return torch.get_device_module(device).get_device_name()
    cpus = Path("/proc/cpuinfo")
    names = [line.split(":")[1] for line in cpus.read_text().splitlines() if line.startswith("model name")]
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Of the checkout; with a plus where files were changed since."""
    here = Path(__file__).parent
    try:
        head, status = (
            subprocess.run(["git", *words], cwd=here, check=True, capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if status else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
