"""Running a critic several times as if it were once: from one state of the random generators and of its buffers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .findings import Findings
from .question import Question


class Buffers:
    """Those of a critic that is about to run. Outside training nothing is written to them."""

    def __init__(self, findings: Findings) -> None:
        parts = [part for module in findings.alive() for part in module.modules() if part.training]
        self.kept = [
            (part._buffers, name, buffer.clone())
            for part in parts
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Inside, the critic has copies of its buffers as they were; what it writes to these is forgotten."""
        now = [owner[name] for owner, name, _ in self.kept]
        for owner, name, before in self.kept:
            owner[name] = before.clone()
        try:
            yield
        finally:
            for (owner, name, _), buffer in zip(self.kept, now, strict=True):
                owner[name] = buffer


class Evaluations:
    """The state from which a critic is about to run. As a context, it leaves the generators as if none had.

    Dropout draws a mask at each run, and spectral norm takes a step of its power iteration. Between the two ends of a
    difference neither may change: the change would be divided by a small step.
    """

    def __init__(self, findings: Findings, device: torch.device) -> None:
        # The state that a capture draws from is that of each replay: it can be neither read nor set back.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph cannot capture critics that run again from the same random numbers: call the penalty "
                "once before the capture, as a warm-up, and with method='double_backward' or 'compiled'; "
                "method='directional' runs them again at every call"
            )
        # Each with the device it is asked for: there may be several, and the current one need not be the critic's.
        self.generators: list[tuple[Any, tuple[torch.device, ...]]] = [(torch, ())]
        if device.type != "cpu":
            self.generators.append((torch.get_device_module(device), (device,) if device.type != "mps" else ()))
        self.states = [module.get_rng_state(*where) for module, where in self.generators]
        self.buffers = Buffers(findings)

    def __enter__(self) -> "Evaluations":
        return self

    def __exit__(self, *_: object) -> None:
        self.rewind()

    def rewind(self) -> None:
        for (module, where), state in zip(self.generators, self.states, strict=True):
            module.set_rng_state(state, *where)

    def again(self, question: Question) -> Question:
        """The same question of a critic that runs from that state each time, and leaves its own buffers as they are."""
        critic = question.critic

        def run(*args: Any, **kwargs: Any) -> Any:
            self.rewind()
            with self.buffers.as_before():
                return critic(*args, **kwargs)

        return question._replace(critic=run)
