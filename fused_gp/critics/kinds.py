"""Modules that change how a critic is to be differentiated: those of DDP, of FSDP, and of torch.compile."""

import sys
from typing import Any

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel


def is_replicated(module: Any) -> bool:
    return isinstance(module, DistributedDataParallel)


def is_sharded(module: Any) -> bool:
    # Imported by whoever shards; importing it ourselves takes longer than importing torch.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def has_compiled_parts(module: Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # as above
    return dynamo is not None and any(
        isinstance(part, dynamo.OptimizedModule) or part._compiled_call_impl is not None for part in module.modules()
    )
