"""In which way the penalty's gradient is to reach the weights, as the caller wants it."""

from typing import NamedTuple

METHODS = ("double_backward", "compiled", "directional", "auto")


class Method(NamedTuple):
    """Validated; what they mean is in `fused_gradient_penalty`."""

    name: str
    step: float | None
    chunk_size: int | None
    allow_kinks: bool
