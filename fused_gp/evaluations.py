"""Running a critic several times as if it were once: from one state of the random generators and of its buffers."""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from .question import Question


class Evaluations:
    """The state from which a critic is about to run.

    Dropout draws a mask at each run, and spectral norm takes a step of its power iteration. Between the two ends of a
    difference neither may change: the change would be divided by a small step.
    """

    def __init__(self, critic: Any, device: torch.device) -> None:
        # The state that a capture draws from is that of each replay: it can be neither read nor set back.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph cannot capture critics that run again from the same random numbers: call the penalty "
                "once before the capture, as a warm-up, and with method='double_backward' or 'compiled'; "
                "method='directional' runs them again at every call"
            )
        self.generators: list[Any] = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
        self.states = [generator.get_rng_state() for generator in self.generators]
        self.buffers: dict[str, Tensor] = {}
        if isinstance(critic, torch.nn.Module) and critic.training:
            self.buffers = {name: buffer.clone() for name, buffer in critic.named_buffers()}

    def rewind(self) -> None:
        """As if the critic had not run."""
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_rng_state(state)

    def again(self, question: Question) -> Question:
        """The same question of a critic that runs from that state each time, and leaves its own buffers as they are."""
        critic = question.critic

        def run(*args: Any, **kwargs: Any) -> Any:
            self.rewind()
            if not self.buffers:
                return critic(*args, **kwargs)
            buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
            return functional_call(critic, buffers, args, kwargs)  # type: ignore[arg-type]

        return question._replace(critic=run)
