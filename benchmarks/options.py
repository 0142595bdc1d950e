"""What several of the programs ask of their options."""

from argparse import ArgumentParser

import torch


def check_device(parser: ArgumentParser, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA or ROCm device, and torch finds none")


def check_rounds(parser: ArgumentParser, rounds: int | None) -> None:
    """None: the default of each case."""
    if rounds is not None and rounds < 2:
        parser.error(f"--rounds must be at least 2, for a spread, got {rounds}")
