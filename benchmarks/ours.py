"""fused_gp as a contestant, with the peers' signatures."""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.peers import Peer
from fused_gp import fused_gradient_penalty, gradient_norm_penalty, interpolate, reference

OURS = "fused_gp"
COMPILED = "fused_gp, compiled"


def ours(**options: Any) -> Callable[[], Peer]:
    """Of these options of the call."""

    def peer() -> Peer:
        return Peer(
            partial(fused_gradient_penalty, **options),
            interpolate,
            gradient_norm_penalty,
            groups=True,
        )

    return peer


def truth() -> Peer:
    """Plain autograd, for fp64."""
    return Peer(reference.fused_gradient_penalty, reference.interpolate, reference.gradient_norm_penalty, groups=True)


def name(**options: Any) -> str:
    """How a contestant of these options is called."""
    words = [OURS, options.get("method", "")]
    if "chunk_size" in options:
        words.append(f"chunks of {options['chunk_size']}")
    return ", ".join(filter(None, words))


def contestants(*every: dict[str, Any]) -> dict[str, Callable[[], Peer]]:
    return {name(**options): ours(**options) for options in every}
