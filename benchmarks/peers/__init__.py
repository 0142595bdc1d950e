"""What people use instead: one form in each file, each the best honest version of itself, all with one signature.

    interpolate(real, fake, alpha)             alpha is (B, 1, ..., 1), on fake
    norm_penalty(gradients)                    mean of (norm - 1)^2
    gradient_penalty(critic, real, fake)       draws alpha as torch.rand(B, 1, ..., 1): one seed, one alpha for all

A form that has no function for one of them has no such function in its `Peer`, and takes no part in those cases.
"""

from collections.abc import Callable

from . import compiled, ctgan, functional, norm_axis, snippet, snippet_compiled, tf_gan, tidy
from .peer import Absent, Peer

COMPILED_CALL, COMPILED_OPS = "torch.func, compiled", "snippet, compiled"

# Each makes a peer that has not compiled anything yet, or raises Absent.
PEERS: dict[str, Callable[[], Peer]] = {
    "snippet": snippet.peer,
    "norm(2, 1)": norm_axis.peer,
    "tidy": tidy.peer,
    "TF-GAN": tf_gan.peer,
    "torch.func": functional.peer,
    COMPILED_CALL: compiled.peer,
    COMPILED_OPS: snippet_compiled.peer,
    "ctgan": ctgan.peer,
}

WITHOUT_OPS = {"torch.func", COMPILED_CALL, "ctgan"}
TABLES_ONLY = {"ctgan"}


def peers_of_ops() -> dict[str, Callable[[], Peer]]:
    return {name: peer for name, peer in PEERS.items() if name not in WITHOUT_OPS}


def peers_of_calls(ndim: int) -> dict[str, Callable[[], Peer]]:
    """Those with a whole penalty of samples of so many dimensions, the batch's included."""
    without = {COMPILED_OPS} if ndim == 2 else {COMPILED_OPS, *TABLES_ONLY}
    return {name: peer for name, peer in PEERS.items() if name not in without}


__all__ = ["COMPILED_CALL", "COMPILED_OPS", "PEERS", "Absent", "Peer", "peers_of_calls", "peers_of_ops"]
