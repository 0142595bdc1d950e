"""What the rows call implementations and baselines: all that the report knows of how they were measured."""

OURS = "fused_gp"
COMPILED = "fused_gp, compiled"

SNIPPET, TIDY = "snippet", "tidy"
COMPILED_CALL, COMPILED_OPS = "torch.func, compiled", "snippet, compiled"
USUAL = "usual"  # of the systems: the lines as their users write them

RUN = "run.json"  # of `make gpu`: how far it has come
# In an experiment, what other ways are compared with: what is there today, or the blocks that fit every device.
TODAY, FIRST = "as today", "first blocks"

# What is to come, and why it is not timed yet.
FLASH, GROUPED, GRAPH = "fused_gp, flash attention", "fused_gp, own convolution", "fused_gp, CUDA graph"
PLANNED = {
    FLASH: "does not exist yet: the second derivative of fused attention",
    GROUPED: "does not exist yet: the second derivative of convolution",
    GRAPH: "does not exist yet: the whole penalty as one CUDA graph",
}

COPIES = "plain copies"
TWO_OPS = "the two ops alone"
NO_PENALTY = "no penalty"
EMPTY_FUNCTIONS = "empty Functions"
BASELINES = (COPIES, TWO_OPS, NO_PENALTY, EMPTY_FUNCTIONS)

BOTH = "interpolation + penalty, forward and backward"  # the case of the two ops together
CRITIC_UPDATES = 5  # in a training step


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def is_peer(name: str) -> bool:
    return not is_ours(name) and name not in BASELINES
