"""The functions of the family by name: the package's beside the reference's, and the batches that each takes."""

import fused_gp
from fused_gp import reference


def ours_and_reference(name, **options):
    """The package's function with these options, and the reference's without: pairs of function and options."""
    return (getattr(fused_gp, name), options), (getattr(reference, name), {})


def batches_for(name, real, fake):
    """Both batches for `fused_gradient_penalty`, the first for the functions of one batch."""
    return (real, fake) if name == "fused_gradient_penalty" else (real,)
