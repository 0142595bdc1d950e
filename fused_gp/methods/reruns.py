"""Running a critic several times as if it were once: from one state of the random generators and of its buffers."""

from typing import Any

import torch

from ..critics.critic import Critic
from ..critics.state import Buffers, RandomState
from .critic_call import CriticCall


class Reruns:
    """The state from which a critic is about to run. As a context, it leaves the generators as if it had not.

    Dropout draws a mask at each run, and spectral norm takes a step of its power iteration. Between the two ends of a
    difference neither may change: the change would be divided by a small step.
    """

    def __init__(self, critic: Critic, device: torch.device) -> None:
        # During a capture the generator's state is that of each replay: it can be neither read nor restored.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph cannot capture critics that run again from the same random numbers: call the penalty "
                "once before the capture, as a warm-up, and with method='double_backward' or 'compiled'; "
                "method='directional' runs them again at every call"
            )
        self._random_state = RandomState(device)
        self.buffers = critic.buffers = Buffers(critic.modules())

    def __enter__(self) -> "Reruns":
        return self

    def __exit__(self, *_: object) -> None:
        self._random_state.restore()

    def again(self, call: CriticCall) -> CriticCall:
        """The same call of a critic that runs from that state each time, and leaves its own buffers as they are."""
        critic = call.critic

        def run(*args: Any, **kwargs: Any) -> Any:
            self._random_state.restore()
            with self.buffers.restored():
                return critic(*args, **kwargs)

        return call._replace(critic=run)
