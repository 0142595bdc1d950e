"""What the rows call implementations and baselines: all that the report knows of how they were measured."""

OURS = "fused_gp"
COMPILED = "fused_gp, compiled"

SNIPPET, TIDY = "snippet", "tidy"
COMPILED_CALL, COMPILED_OPS = "torch.func, compiled", "snippet, compiled"
USUAL = "usual"  # of the systems: the lines as their users write them

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
