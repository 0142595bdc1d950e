"""What people use instead: one form in each file, each in its best form, all with one signature.

    interpolate(real, fake, alpha)             alpha is (B, 1, ..., 1), on fake
    norm_penalty(gradients)                    mean of (norm - 1)^2
    gradient_penalty(critic, real, fake)       draws alpha as torch.rand(B, 1, ..., 1): the same seed, the same alpha

A form without a function for one of them has none in its `Implementation`, and takes no part in those cases.
"""

from collections.abc import Callable

from benchmarks.names import COMPILED_CALL, COMPILED_OPS, SNIPPET, TIDY

from . import compiled, ctgan, functional, norm_axis, snippet, snippet_compiled, tf_gan, tidy
from .implementation import Absent, Implementation

# Each makes a peer that has not compiled anything yet, or raises Absent.
PEERS: dict[str, Callable[[], Implementation]] = {
    SNIPPET: snippet.peer,
    "norm(2, 1)": norm_axis.peer,
    TIDY: tidy.peer,
    "TF-GAN": tf_gan.peer,
    "torch.func": functional.peer,
    COMPILED_CALL: compiled.peer,
    COMPILED_OPS: snippet_compiled.peer,
    "ctgan": ctgan.peer,
}

WITHOUT_OPS = {"torch.func", COMPILED_CALL, "ctgan"}
TABLES_ONLY = {"ctgan"}


def peers_of_ops() -> dict[str, Callable[[], Implementation]]:
    return {name: peer for name, peer in PEERS.items() if name not in WITHOUT_OPS}


def peers_of_calls(ndim: int) -> dict[str, Callable[[], Implementation]]:
    """Those with a whole penalty of samples of so many dimensions, the batch's included."""
    without = {COMPILED_OPS} if ndim == 2 else {COMPILED_OPS, *TABLES_ONLY}
    return {name: peer for name, peer in PEERS.items() if name not in without}


__all__ = ["PEERS", "Absent", "Implementation", "peers_of_calls", "peers_of_ops"]
