"""fused_gp and its reference, with the peers' signatures."""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.names import OURS, PLANNED
from benchmarks.peers import Absent, Implementation
from fused_gp import fused_gradient_penalty, gradient_norm_penalty, interpolate, reference


def ours(**options: Any) -> Callable[[], Implementation]:
    """With these options of the call."""

    def implementation() -> Implementation:
        return Implementation(
            partial(fused_gradient_penalty, **options),
            interpolate,
            gradient_norm_penalty,
            groups=True,
            first_order=options.get("method") == "directional",
        )

    return implementation


def plain_autograd() -> Implementation:
    """The reference, for fp64."""
    return Implementation(
        reference.fused_gradient_penalty, reference.interpolate, reference.gradient_norm_penalty, groups=True
    )


def name(**options: Any) -> str:
    """What an implementation with these options is called."""
    words = [OURS, options.get("method", "")]
    if "chunk_size" in options:
        words.append(f"chunks of {options['chunk_size']}")
    return ", ".join(filter(None, words))


def implementations(*every: dict[str, Any]) -> dict[str, Callable[[], Implementation]]:
    return {name(**options): ours(**options) for options in every}


def planned(*ways: str) -> dict[str, Callable[[], Implementation]]:
    """Of `names.PLANNED`: each stands among the rows, as what was not timed."""

    def missing(way: str) -> Implementation:
        raise Absent(PLANNED[way])

    return {way: partial(missing, way) for way in ways}
