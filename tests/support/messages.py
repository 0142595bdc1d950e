"""Errors of the methods, word for word."""

import re


def exactly(message):
    """A pattern for pytest.raises that matches this message alone."""
    return f"^{re.escape(message)}$"


# To be completed with what was found and what to use.
NOT_TWICE_DIFFERENTIABLE = "method='double_backward' must differentiate the critic twice, and found {}. Use {}."
NOT_TWICE_DIFFERENTIABLE_COMPILED = NOT_TWICE_DIFFERENTIABLE.replace("double_backward", "compiled")

IF_SMOOTH = "method='directional' where the critic is smooth"
FLASH = (
    'an operation of which autograd says "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is '
    'not implemented"',
    f"{IF_SMOOTH}, or math attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
)
FUSED = "the autograd Function FusedTanh, whose backward is once_differentiable", IF_SMOOTH
COMPILED = (
    "a part that torch.compile compiled",
    "method='compiled', or, where the critic is smooth, method='directional'",
)

NOT_SMOOTH = (
    "method='directional' needs a smooth critic, and found {}: a difference across its kink is off by as much as a "
    "half at any step. Use method='double_backward', or a smooth activation such as SiLU; allow_kinks=True runs it "
    "nevertheless."
)
REENTRANT = (
    "critic must not use reentrant checkpointing, through which no input gradient can be taken. Use "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)
NO_PART_IN_THE_SCORES = (
    "critic must return scores that depend on the samples it is given, got scores that do not: is there a detach() "
    "or no_grad() inside it?"
)

COUPLED_SAMPLES = (
    "critic must score each sample by itself with chunk_size, got one whose first score depends on the second sample "
    "(batch normalisation, minibatch statistics, or scores in another order)"
)
NOT_A_MODULE = (
    "critic must be an nn.Module with chunk_size, whose parameters are to be known, got function: pass the module "
    "itself, with labels and other arguments in critic_args"
)

# Of method='compiled'.
ANOTHER_METHOD = "Use method='double_backward', or, where the critic is smooth, method='directional'."
NOT_COMPILED_WHOLE = (
    f"method='compiled' needs a critic that torch.compile can compile whole, and it says: {{}} {ANOTHER_METHOD}"
)
BUFFER_CHANGED = (
    "method='compiled' needs a critic that changes no buffer on the way from points to scores, as batch normalisation "
    f"does in training mode, got one that does. {ANOTHER_METHOD}"
)
SAVED_TENSOR_HOOKS = (
    "method='compiled' cannot trace activation checkpointing, save_on_cpu and other hooks on saved tensors: "
    "leave them out, since the compiler itself decides what to keep, or use method='double_backward', or, where the "
    "critic is smooth, method='directional'"
)
