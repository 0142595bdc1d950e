"""Run by tests/distributed/test_ddp_and_fsdp.py with torchrun: every case on every rank of one process group.

A case returns two lists of tensors: those of this rank, and those of one process that computes the same on the joined
batch. Its result is the largest relative error of a rank, and the largest difference between ranks; or the error that
it raised, which must be the same on every rank. Results are written as JSON.
"""

import datetime
import gc
import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from fused_gp import (
    GradientPenalty,
    fused_gradient_penalty,
    gradient_norm_penalty,
    input_gradient_penalty,
    r1_penalty,
)
from fused_gp.ops import torch_ops

BATCH, WIDTH, STEPS = 16, 6, 2
CASES = {}


def case(name):
    def register(function):
        CASES[name] = function
        return function

    return register


class WithUnusedParameters(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.unused = net, nn.Linear(3, 2).double()

    def forward(self, x):
        return self.net(x)


def smooth(activation=nn.SiLU, dtype=torch.float64):
    torch.manual_seed(1)
    layers = nn.Linear(WIDTH, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 1)
    return nn.Sequential(*layers).to(dtype)


def not_smooth():
    return smooth(nn.LeakyReLU)


def with_unused_parameters():
    return WithUnusedParameters(smooth())


def normalised():
    """DDP broadcasts its buffers at every forward, and each forward changes them."""
    torch.manual_seed(1)
    return nn.Sequential(spectral_norm(nn.Linear(WIDTH, 8)), nn.SiLU(), spectral_norm(nn.Linear(8, 1))).double()


def samples(dtype=torch.float64):
    """Real, fake and alpha; the same alpha for joined and sharded runs."""
    generator = torch.Generator().manual_seed(2)
    real, fake = (torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return (
        real.to(dtype),
        (fake + 1).to(dtype),
        torch.rand(BATCH, 1, generator=generator, dtype=torch.float64).to(dtype),
    )


def rank_rows(part=0, parts=1):
    """The rows of this rank in a part of the batch."""
    size = BATCH // parts
    share = size // dist.get_world_size()
    start = part * size + dist.get_rank() * share
    return slice(start, start + share)


ALL_ROWS = slice(0, BATCH)


def penalty(critic, where, dtype=torch.float64, **options):
    real, fake, alpha = samples(dtype)
    return fused_gradient_penalty(critic, real[where], fake[where], alpha=alpha[where], weight=10, **options)


def critic_loss(critic, where, dtype=torch.float64):
    real, fake, _ = samples(dtype)
    return critic(fake[where]).mean() - critic(real[where]).mean()


# DDP prepares its reducer in each forward, so the order of the two runs of the critic matters.
LOSSES = {
    "alone": penalty,
    "penalty first": lambda critic, where, **options: penalty(critic, where, **options) + critic_loss(critic, where),
    "scores first": lambda critic, where, **options: critic_loss(critic, where) + penalty(critic, where, **options),
}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(critic, missing=0.0):
    return [torch.full_like(full(p), missing) if p.grad is None else full(p.grad) for p in critic.parameters()]


def weights(critic):
    return [full(p.detach()) for p in critic.parameters()]


def trained(critic, loss, net=None, *, where, call=lambda critic: critic):
    """The weights after some steps, the last gradients beside them."""
    optimizer = torch.optim.SGD(critic.parameters(), 0.02, momentum=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(call(critic), where).backward()
        optimizer.step()
    # In one process parameters without a part in the loss have no gradient. On the ranks DDP waits for one.
    return gradients(net or critic, 0.0 if net is None else torch.nan) + weights(net or critic)


def training(build, wrap, loss="alone", call=lambda critic: critic, **options):
    """Ours on this rank's share against plain double backward in one process on the whole batch."""
    net = build()
    ours = trained(wrap(net), lambda c, w: LOSSES[loss](c, w, **options), net, where=rank_rows(), call=call)
    return ours, trained(build(), LOSSES[loss], where=ALL_ROWS)


def ddp(**options):
    return lambda net: DistributedDataParallel(net, **options)


def shard(net, **options):
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(net, **options)


METHODS = {
    "double_backward": (not_smooth, {}),
    "directional": (smooth, {"method": "directional"}),
    "auto": (not_smooth, {"method": "auto"}),
    "chunks": (not_smooth, {"chunk_size": 2}),
    "chunks, directional": (smooth, {"chunk_size": 2, "method": "directional"}),
    "chunks, auto": (not_smooth, {"chunk_size": 3, "method": "auto"}),
}
for method, (build, options) in METHODS.items():
    for loss in LOSSES:
        CASES[f"ddp: {method}, {loss}"] = lambda b=build, o=options, n=loss: training(b, ddp(), n, **o)

THREE = {"double_backward": {}, "directional": {"method": "directional"}, "chunks": {"chunk_size": 2}}
for method, options in THREE.items():
    CASES[f"ddp, small buckets: {method}"] = lambda o=options: training(smooth, ddp(bucket_cap_mb=1e-6), **o)
    CASES[f"ddp, views: {method}"] = lambda o=options: training(smooth, ddp(gradient_as_bucket_view=True), **o)
    CASES[f"ddp, all found: {method}"] = lambda o=options: training(smooth, ddp(find_unused_parameters=True), **o)
    CASES[f"ddp, unused: {method}"] = lambda o=options: training(with_unused_parameters, ddp(), **o)
    CASES[f"ddp, unused and found: {method}"] = lambda o=options: unused_and_found(**o)
    CASES[f"ddp, static_graph: {method}"] = lambda o=options: training(smooth, ddp(static_graph=True), **o)
    CASES[f"ddp, no_sync: {method}"] = lambda o=options: accumulated(**o)
    CASES[f"ddp, lazy: {method}"] = lambda o=options: lazy(**o)


def unused_and_found(**options):
    """Unused parameters get no gradient, as with DDP alone."""
    ours, expected = training(with_unused_parameters, ddp(find_unused_parameters=True), **options)
    unused = slice(6, 8)
    assert all(grad.isnan().all() for grad in ours[unused])
    del ours[unused], expected[unused]
    return ours, expected


def accumulated(**options):
    """Two halves of the batch, reduced with the second."""
    net = smooth()
    critic = DistributedDataParallel(net)
    for _ in range(STEPS):
        net.zero_grad()
        with critic.no_sync():
            LOSSES["scores first"](critic, rank_rows(0, 2), **options).backward()
        LOSSES["alone"](critic, rank_rows(1, 2), **options).backward()
    alone = smooth()
    LOSSES["scores first"](alone, slice(0, BATCH // 2)).backward()
    LOSSES["alone"](alone, slice(BATCH // 2, BATCH)).backward()
    return gradients(net), gradients(alone)


def lazy(**options):
    """Steps with and without a penalty, in one backward with the scores."""

    def run(critic, net, where, **options):
        module = GradientPenalty(r1_penalty, weight=10, every=2, **options)
        return trained(critic, lambda c, w: critic_loss(c, w) + module(c, samples()[0][w]), net, where=where)

    net = smooth()
    return run(DistributedDataParallel(net), net, rank_rows(), **options), run(smooth(), None, ALL_ROWS)


@case("ddp, lazy and alone")
def _():
    """The backward of a skipped penalty reaches no parameter, and leaves DDP ready for the next."""
    net, alone = smooth(), smooth()
    critic = DistributedDataParallel(net)
    for each, module, where in (
        (critic, GradientPenalty(every=3), rank_rows()),
        (alone, GradientPenalty(every=3), ALL_ROWS),
    ):
        for _ in range(5):
            each.zero_grad()
            real, fake, alpha = samples()
            penalty = module(each, real[where], fake[where], alpha=alpha[where])
            if penalty.grad_fn is None:
                penalty.backward()
                assert all(p.grad is None for p in each.parameters())
            else:
                penalty.backward()
                kept = gradients(each)
        if each is critic:
            ours = kept
    return ours, kept


@case("ddp, a lambda")
def _():
    return training(not_smooth, ddp(), call=lambda critic: lambda x: critic(x))


@case("ddp, its module beside its scores")
def _():
    """DDP's own forward prepares it for the gradients of both terms."""
    net, alone = smooth(), smooth()
    critic = DistributedDataParallel(net)
    (critic_loss(critic, rank_rows()) + penalty(net, rank_rows())).backward()
    LOSSES["scores first"](alone, ALL_ROWS).backward()
    return gradients(net), gradients(alone)


@case("ddp, one method after the other: directional")
def _():
    """Their penalties do not reach different parameters."""
    net, alone = smooth(), smooth()
    critic = DistributedDataParallel(net)
    for method in ("directional", "double_backward"):
        net.zero_grad()
        penalty(critic, rank_rows(), method=method).backward()
        ours = gradients(net, torch.nan)
    penalty(alone, ALL_ROWS).backward()
    return ours, gradients(alone)


@case("ddp, in a dict")
def _():
    def in_a_dict(critic):
        models = {"D": critic}
        return lambda x: models["D"](x)

    return training(not_smooth, ddp(), call=in_a_dict)


@case("ddp, chosen by a number")
def _():
    """The same callable has called a module without DDP before."""
    net, alone, number = smooth(), smooth(), 0
    critics = [smooth(), DistributedDataParallel(net)]

    def critic(x):
        return critics[number](x)

    penalty(critic, rank_rows()).backward()
    number = 1
    penalty(critic, rank_rows()).backward()
    penalty(alone, ALL_ROWS).backward()
    return gradients(net), gradients(alone)


@case("ddp, a backward each")
def _():
    """Each after its own forward."""
    net, alone = smooth(), smooth()
    for critic, where in ((DistributedDataParallel(net), rank_rows()), (alone, ALL_ROWS)):
        critic_loss(critic, where).backward()
        penalty(critic, where).backward()
    return gradients(net), gradients(alone)


@case("ddp, a critic that has run")
def _():
    """input_gradient_penalty is given no critic; the loss and the penalty have one backward."""
    net, alone = smooth(), smooth()
    for critic, where in ((DistributedDataParallel(net), rank_rows()), (alone, ALL_ROWS)):
        x = samples()[0][where].requires_grad_()
        scores = critic(x)
        (scores.mean() + input_gradient_penalty(scores, x)).backward()
    return gradients(net), gradients(alone)


@case("ddp, buffers: double_backward")
def _():
    return training(normalised, ddp())


@case("ddp, buffers: directional")
def _():
    return training(normalised, ddp(), method="directional")


@case("ddp, compiled by the user")
def _():
    def penalise(critic, real, fake, alpha):
        return fused_gradient_penalty(critic, real, fake, alpha=alpha)

    run = torch.compile(penalise, fullgraph=True, backend="aot_eager")
    run(DistributedDataParallel(smooth()), *samples())


@case("ddp, buffers: chunks")
def _():
    return training(normalised, ddp(), chunk_size=2)


@case("ddp, compiled")
def _():
    return training(smooth, ddp(), method="compiled")


def in_bfloat16(**options):
    """Compared with one process under the same autocast, which adds products in another order."""

    def run(critic, net, where, **options):
        with torch.autocast("cpu", torch.bfloat16):
            loss = penalty(critic, where, torch.float32, **options)
        loss.backward()
        return gradients(net)

    net, alone = smooth(dtype=torch.float32), smooth(dtype=torch.float32)
    return run(DistributedDataParallel(net), net, rank_rows(), **options), run(alone, alone, ALL_ROWS)


CASES["ddp, bfloat16"] = in_bfloat16
CASES["ddp, bfloat16: chunks"] = lambda: in_bfloat16(chunk_size=2)

SHARDED = {
    "fsdp2": shard,
    "fsdp2, one group": fully_shard,
    "fsdp2, kept": lambda net: shard(net, reshard_after_forward=False),
}
for wrapper, wrap in SHARDED.items():
    for loss in LOSSES:
        CASES[f"{wrapper}: directional, {loss}"] = lambda w=wrap, n=loss: training(smooth, w, n, method="directional")
    CASES[f"{wrapper}: double_backward"] = lambda w=wrap: training(smooth, w)
CASES["fsdp2: auto"] = lambda: training(smooth, shard, method="auto")
CASES["fsdp2: compiled"] = lambda: training(smooth, shard, method="compiled")
CASES["fsdp2: chunks"] = lambda: training(smooth, shard, chunk_size=2)
CASES["fsdp2: chunks, directional"] = lambda: training(smooth, shard, method="directional", chunk_size=2)
CASES["fsdp2, a lambda"] = lambda: training(
    smooth, shard, call=lambda critic: lambda x: critic(x), method="directional"
)
CASES["fsdp2, kinked: auto"] = lambda: training(not_smooth, shard, method="auto")


@case("fsdp2: r1_penalty")
def _():
    net, alone = smooth(), smooth()
    r1_penalty(shard(net), samples()[0][rank_rows()], weight=10, method="directional").backward()
    r1_penalty(alone, samples()[0], weight=10).backward()
    return gradients(net), gradients(alone)


@case("fsdp2: single precision")
def _():
    net, alone = smooth(dtype=torch.float32), smooth()
    penalty(shard(net), rank_rows(), torch.float32, method="directional").backward()
    penalty(alone, ALL_ROWS).backward()
    return gradients(net), gradients(alone)


@case("fsdp1: double_backward")
def _():
    return training(smooth, lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu")))


@case("fsdp1: directional")
def _():
    net, alone = smooth(), smooth()
    critic = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    penalty(critic, rank_rows(), method="directional").backward()
    penalty(alone, ALL_ROWS).backward()
    with FullyShardedDataParallel.summon_full_params(critic, with_grads=True):
        return [grad.clone() for grad in gradients(critic)], gradients(alone)


@case("samples on all ranks, in blocks")
def _():
    """Writes into blocks of a DTensor would be lost."""
    whole = torch.linspace(-1, 1, BATCH * WIDTH, dtype=torch.float64).view(BATCH, WIDTH)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    found = []
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    with mock.patch.object(torch_ops, "BLOCK", 2 * WIDTH):
        for samples in (sharded, whole):
            leaf = samples.detach().requires_grad_()
            (first,) = torch.autograd.grad(gradient_norm_penalty(leaf), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), leaf)
            found.append([x.full_tensor() if isinstance(x, DTensor) else x for x in (first.detach(), second)])
    torch.use_deterministic_algorithms(False)
    return found


def result_of(function):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # From DDP, for plain double backward too: the weight gradient of a layer with one output is transposed.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            ours, expected = (torch.cat([t.flatten() for t in tensors]) for tensors in function())
    except (ValueError, RuntimeError, AssertionError, Warning) as error:
        result = f"{type(error).__name__}: {error}"
    else:
        all_ours = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ours, ours)
        result = {
            "error": ((ours - expected).norm() / expected.norm().clamp(min=1e-30)).item(),
            "between ranks": max((other - ours).abs().max().item() for other in all_ours),
        }
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    if all(isinstance(each, str) for each in results) and len(set(results)) == 1:
        return {"raised": result}
    assert all(isinstance(each, dict) for each in results), results
    # The maximum with NaN, of a missing gradient, is NaN.
    return {key: torch.tensor([each[key] for each in results]).max().item() for key in result}


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    found = {}
    for name, function in CASES.items():
        found[name] = result_of(function)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found, indent=1))
    # DDP, in reference cycles, still refers to the group: freed before the group is, or gloo's threads outlive Python.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
