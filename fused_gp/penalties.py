"""The calls that replace the fifteen lines: critic and samples in, penalty out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, reference
from .critics.autograd_graph import NotTwiceDifferentiable, reached_leaves
from .critics.critic import profile_by_parameter
from .critics.profile import CriticProfile
from .methods import choice
from .methods.critic_call import CriticCall, PenaltyPoints
from .methods.double_backward import twice_differentiable_gradients
from .methods.input_gradients import cotangent, input_gradients
from .ops.backends import backend_for
from .ops.interpolation import interpolate_rows
from .ops.norm_penalty import norm_penalty_rows


def fused_gradient_penalty(
    critic: Callable[..., Tensor],
    real: Any,
    fake: Any,
    *,
    alpha: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    target: float = 1.0,
    one_sided: bool = False,
    eps: float = 1e-12,
    weight: float = 1.0,
    reduction: str = "mean",
    group_size: int = 1,
    grad_scale: Any = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    method: str = "double_backward",
    step: float | None = None,
    chunk_size: int | None = None,
    allow_kinks: bool = False,
    backend: str = "auto",
    return_norms: bool = False,
    return_error: bool = False,
) -> Any:
    r"""The gradient penalty of a critic between real and fake samples.

    .. math::
        \hat x_i = \alpha_i \tilde x_i + (1 - \alpha_i) x_i, \qquad
        g = \frac{\partial}{\partial \hat x} \sum D(\hat x), \qquad
        n_i = \sqrt{\textstyle\sum g_i^2 + \epsilon}, \qquad
        P = \text{weight} \cdot \operatorname*{mean}_i\, (n_i - t)^2

    with :math:`x` real, :math:`\tilde x` fake and one :math:`\alpha_i \sim U[0, 1)` per sample. Add it to the critic's
    loss::

        loss = fake_score.mean() - real_score.mean() + fused_gradient_penalty(critic, real, fake, weight=10)

    Args:
        critic: callable that takes the interpolated samples and returns one tensor with at least one score per
            sample: (B,), (B, 1), or a map of patches. All its elements are summed. It runs once, except where `method`
            or `chunk_size` says otherwise, and some more times in its first call with these, to see what it does.
        real: (B, ...) fp16, bf16, fp32 or fp64, any number of dimensions from 1, any memory format. Or a tuple, list
            or dict of such tensors with one B, nested as you like: each sample has one alpha and one norm over all of
            them, and the critic is called with the same structure as its one argument (``lambda x: critic(*x)`` takes
            a tuple apart). A tensor that the critic ignores counts as gradient zero.
        fake: the same, of the same shape, dtype and device. Detach it in the critic's step; attached to a generator,
            the penalty's gradient flows into it.
        alpha: the position between real (0) and fake (1), instead of a random one: a number in [0, 1], or a floating
            tensor of shape (), (B,) or (B, 1, ..., 1).
        generator: draws alpha, exactly as ``torch.rand(B, 1, ..., 1, generator=generator)`` does, before the critic
            runs. Codes with alpha on *real* get the same numbers with real and fake swapped.
        target: the norm t to reach, >= 0. With 0, zero-centred: the squared norm itself, without root or eps.
        one_sided: penalise only norms above the target, max(n - t, 0)^2 (WGAN-LP).
        eps: added inside the root, >= 0; with 0 a zero gradient has derivative zero, not NaN.
        weight: the coefficient of the penalty, often called lambda.
        reduction: "mean", "sum" or "none" over the samples.
        group_size: p consecutive samples, which the critic scores as one, have one alpha and one norm (PacGAN). B must
            be a multiple of p; alpha, norms and scores then have B / p rows.
        grad_scale: multiply the scores by this before the input gradient, against underflow in fp16, and divide
            again inside the norm. A number > 0, a floating tensor of one element, or the GradScaler itself, without a
            synchronisation with the device. It is rounded to 8 bits, which does not change powers of two.
        critic_args, critic_kwargs: further arguments of the critic, such as labels.
        method: how the penalty's gradient reaches the weights; its value is the same, and exact, by all of them.

            - "double_backward": autograd, twice. Exact, to every order; for critics that autograd differentiates twice.
            - "compiled": the penalty of this critic compiled whole by torch.compile, and kept for later calls. Exact,
              differentiable once; for any critic that compiles. The gradient is computed in the call. Batch sizes other
              than the first share one more compilation. Dropout draws other masks than in eager mode.
            - "directional": a central difference of the scores along the penalty's own gradient, held fixed. The critic
              runs three times, and is differentiated once; off by about 1e-5 in fp32, 1e-2 under bf16 autocast. For
              smooth critics that autograd cannot differentiate twice (flash attention, compiled critics, FSDP2, fused
              kernels), or where memory is short. Differentiable once.
            - "auto": "double_backward" where that works, else "directional", as the critic's first call shows.
        step: of "directional", as a fraction of the mean norm of the points. By default found by trial, at the critic's
            first call and every 1000th, around the cube root of the spacing at 1 of the coarsest type that the critic
            computes in (5e-3 in fp32): where the slopes of the scores change least from step to step.
        chunk_size: go through the batch this many samples at a time, so that memory does not grow with it. The gradient
            is computed in the call, as exactly as by the method. For an nn.Module that scores each sample by itself;
            what has B in front in `critic_args` and `critic_kwargs` is cut too. Differentiable once; reduction "mean"
            or "sum". Dropout draws chunk by chunk. Parameters without a gradient get zeros.
        allow_kinks: let "directional" run although the critic has an operation with a discontinuous derivative (ReLU,
            max-pool). The gradient is then off by as much as a half.
        backend: "auto" (Triton on CUDA, ROCm and XPU tensors, plain torch elsewhere), "triton" or "torch".
        return_norms: also return the norms :math:`n_i`, for logging. The backward needs them unchanged: copy them
            before you change them in place.
        return_error: also return, last, an error estimate for logging, a scalar: 0 where the method is exact; with
            "directional" the relative difference between the measured derivative of the scores and the one that the
            norms give (the largest of the chunks'). It shows a bad step; it cannot show kinks.

    Returns:
        The penalty, a scalar, or (B,) with reduction "none"; with `return_norms`, the pair of it and the norms, (B,),
        detached. fp32, or fp64 for fp64 samples. Under ``torch.no_grad()`` or ``inference_mode()`` it is the value
        alone, without a graph.

    Differentiable in reverse mode, to every order in which the critic is, unless the method or chunks say once: beyond
    it, their backward raises a RuntimeError. No tensor of the caller's is changed, no ``.grad`` written.

    Raises:
        TypeError: an argument is not of the kind above, or the critic returns something other than one tensor.
        ValueError: shapes, devices or values do not fit, the scores do not depend on the samples, or the method does
            not work for this critic: the first call raises it, and names the cause.

    Warns, once per critic, when a module has batch normalisation in training mode: the gradient of a summed score is
    the gradient of each sample's score only where a score does not depend on other samples.

    From Gulrajani et al., "Improved Training of Wasserstein GANs", 2017; one-sided: Petzka et al., "On the
    regularization of Wasserstein GANs", 2018; zero-centred: Thanh-Tung et al., "Improving Generalization and Stability
    of Generative Adversarial Networks", 2019; groups: Lin et al., "PacGAN", 2018.
    """
    arguments.critic(critic, critic_args, critic_kwargs)
    reals, fakes, structure = arguments.real_and_fake(real, fake)
    first = reals[0]
    form = arguments.penalty_form(first.shape[0], target, one_sided, eps, weight, reduction, return_norms, group_size)
    if grad_scale is not None:
        form, grad_scale = arguments.score_scale(form, grad_scale, reals)
    if generator is not None:
        arguments.generator(generator, first.device)
        if alpha is not None:
            raise ValueError("generator draws alpha, so give one of the two, got both alpha and generator")
    chosen_method = arguments.method(method, step, chunk_size, allow_kinks, return_error)
    ops = backend_for(backend, first)
    if alpha is None:
        # Before the critic runs: its dropout must not draw between the seed and alpha. In the default dtype, as the
        # usual torch.rand(B, 1, 1, 1), which draws the same numbers from the same seed. Without a generator the keyword
        # is left out: with it, even as None, torch.compile cannot trace a batch of variable size.
        keyword: dict[str, Any] = {} if generator is None else {"generator": generator}
        column = torch.rand((form.rows, 1), device=first.device, **keyword)
    else:
        column = arguments.alpha(alpha, form.rows, reals)
    call = CriticCall(critic, structure, critic_args, critic_kwargs or {}, grad_scale, form, ops)
    points = PenaltyPoints([*reals, *fakes, column], _interpolated)
    return choice.compute_penalty(call, points, chosen_method).returned(return_norms, return_error)


def _interpolated(batch: Sequence[Tensor], ops: Any) -> list[Tensor]:
    """x_hat, of a batch of reals, fakes and alpha."""
    half = len(batch) // 2
    return interpolate_rows(batch[:half], batch[half:-1], batch[-1], ops)


def dragan_penalty(
    critic: Callable[..., Tensor],
    real: Any,
    *,
    noise_scale: float = 0.5,
    alpha: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    target: float = 1.0,
    one_sided: bool = False,
    eps: float = 1e-12,
    weight: float = 1.0,
    reduction: str = "mean",
    group_size: int = 1,
    grad_scale: Any = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    method: str = "double_backward",
    step: float | None = None,
    chunk_size: int | None = None,
    allow_kinks: bool = False,
    backend: str = "auto",
    return_norms: bool = False,
    return_error: bool = False,
) -> Any:
    r"""The gradient penalty around the real samples (DRAGAN).

    .. math:: \tilde x = x + s\, \operatorname{std}(x)\, u, \qquad u \sim U[0, 1)

    with one :math:`u` per element and one standard deviation over the whole of :math:`x` (each tensor's own, where
    there are several); then `fused_gradient_penalty` between :math:`x` and :math:`\tilde x`.

    Args:
        critic, real: as in `fused_gradient_penalty`.
        noise_scale: s, how far around the samples, in standard deviations.
        generator: where the noise, as ``torch.rand_like(real)``, is drawn from, and after it alpha, unless given.
        alpha, target, one_sided, eps, weight, reduction, group_size, grad_scale, critic_args, critic_kwargs, method,
            step, chunk_size, allow_kinks, backend, return_norms, return_error: as in `fused_gradient_penalty`.

    Returns, raises, warns and derivatives as in `fused_gradient_penalty`; a standard deviation needs two elements.

    From Kodali et al., "On Convergence and Stability of GANs", 2017.
    """
    arguments.critic(critic, critic_args, critic_kwargs)
    noise_scale = arguments.number("noise_scale", noise_scale)
    reals, structure = arguments.samples("real", real)
    if generator is not None:
        arguments.generator(generator, reals[0].device)
    if any(x.numel() < 2 for x in reals):
        raise ValueError("real must hold at least two elements to have a standard deviation, got one")

    def noise(x: Tensor) -> Tensor:  # the same numbers either way, but vmap supports the first only
        return torch.rand_like(x) if generator is None else torch.empty_like(x).uniform_(generator=generator)

    noisy = [x + noise_scale * x.std() * noise(x) for x in reals]
    return fused_gradient_penalty(
        critic, real, arguments.rebuild(noisy, structure), alpha=alpha, generator=generator if alpha is None else None,
        target=target, one_sided=one_sided, eps=eps, weight=weight, reduction=reduction, group_size=group_size,
        grad_scale=grad_scale, critic_args=critic_args, critic_kwargs=critic_kwargs, method=method, step=step,
        chunk_size=chunk_size, allow_kinks=allow_kinks, backend=backend, return_norms=return_norms,
        return_error=return_error,
    )  # fmt: skip


def r1_penalty(
    critic: Callable[..., Tensor],
    real: Any,
    *,
    weight: float = 1.0,
    reduction: str = "mean",
    group_size: int = 1,
    grad_scale: Any = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    method: str = "double_backward",
    step: float | None = None,
    chunk_size: int | None = None,
    allow_kinks: bool = False,
    backend: str = "auto",
    return_norms: bool = False,
    return_error: bool = False,
) -> Any:
    r"""The squared norm of the critic's gradient at the real samples.

    .. math:: R_1 = \frac{\text{weight}}{2} \operatorname*{mean}_i\, \lVert \nabla_x \textstyle\sum D(x) \rVert_i^2

    Args:
        weight: the coefficient, usually called gamma. Half of it multiplies the mean, as in StyleGAN.
        critic, real, reduction, group_size, grad_scale, critic_args, critic_kwargs, method, step, chunk_size,
            allow_kinks, backend, return_norms, return_error: as in `fused_gradient_penalty`.

    Returns, raises, warns and derivatives as in `fused_gradient_penalty`. The norms are those at the real samples.

    From Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018.
    """
    return _zero_centred(
        critic, "real", real, weight, reduction, group_size, grad_scale, critic_args, critic_kwargs, method, step,
        chunk_size, allow_kinks, backend, return_norms, return_error,
    )  # fmt: skip


def r2_penalty(
    critic: Callable[..., Tensor],
    fake: Any,
    *,
    weight: float = 1.0,
    reduction: str = "mean",
    group_size: int = 1,
    grad_scale: Any = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    method: str = "double_backward",
    step: float | None = None,
    chunk_size: int | None = None,
    allow_kinks: bool = False,
    backend: str = "auto",
    return_norms: bool = False,
    return_error: bool = False,
) -> Any:
    r"""The squared norm of the critic's gradient at the fake samples: `r1_penalty`, with fake for real.

    .. math:: R_2 = \frac{\text{weight}}{2} \operatorname*{mean}_i\, \lVert \nabla \textstyle\sum D(\tilde x) \rVert_i^2

    In the critic's step pass ``fake.detach()``: attached, the penalty's gradient flows into the generator.

    From Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018; with R1: Huang et al., "The
    GAN is dead; long live the GAN! A Modern GAN Baseline", 2024.
    """
    return _zero_centred(
        critic, "fake", fake, weight, reduction, group_size, grad_scale, critic_args, critic_kwargs, method, step,
        chunk_size, allow_kinks, backend, return_norms, return_error,
    )  # fmt: skip


def _zero_centred(
    critic: Any, name: str, value: Any, weight: Any, reduction: Any, group_size: Any, grad_scale: Any, critic_args: Any,
    critic_kwargs: Any, method: Any, step: Any, chunk_size: Any, allow_kinks: Any, backend: Any, return_norms: Any,
    return_error: Any,
) -> Any:  # fmt: skip
    """At the samples of this name: the squared norm, without root or eps, times half the weight."""
    arguments.critic(critic, critic_args, critic_kwargs)
    samples, structure = arguments.samples(name, value)
    half = 0.5 * arguments.number("weight", weight)
    form = arguments.penalty_form(samples[0].shape[0], 0.0, False, 0.0, half, reduction, return_norms, group_size)
    if grad_scale is not None:
        form, grad_scale = arguments.score_scale(form, grad_scale, samples)
    chosen_method = arguments.method(method, step, chunk_size, allow_kinks, return_error)
    ops = backend_for(backend, samples[0])
    call = CriticCall(critic, structure, critic_args, critic_kwargs or {}, grad_scale, form, ops)
    points = PenaltyPoints(samples, _new_tensors)
    return choice.compute_penalty(call, points, chosen_method).returned(return_norms, return_error)


def _new_tensors(batch: Sequence[Tensor], ops: Any) -> list[Tensor]:
    """The samples as tensors of our own: what the caller computes from his samples is no part of the input gradient."""
    if ops is reference:  # torch.func makes its own
        return list(batch)
    return [x.view_as(x) if x.requires_grad else x.clone() if x.is_inference() else x.detach() for x in batch]


_GIVE_THE_CRITIC = (
    "pass the critic itself to fused_gradient_penalty, r1_penalty or r2_penalty, which can be compiled, and have other "
    "methods"
)


def input_gradient_penalty(
    outputs: Any,
    inputs: Any,
    *,
    output_weights: Any = None,
    target: float = 1.0,
    one_sided: bool = False,
    eps: float = 1e-12,
    weight: float = 1.0,
    reduction: str = "mean",
    group_size: int = 1,
    grad_scale: Any = None,
    backend: str = "auto",
    return_norms: bool = False,
) -> Any:
    r"""The gradient penalty of a critic that has already run.

    .. math::
        g = \frac{\partial}{\partial x} \sum_k c_k \sum D_k(x), \qquad n_i = \sqrt{\textstyle\sum g_i^2 + \epsilon},
        \qquad P = \text{weight} \cdot \operatorname*{mean}_i\, (n_i - t)^2

    One run of the critic then serves its loss and its penalty, at the samples themselves::

        images.requires_grad_()
        logits, aux = critic(images)
        gp = input_gradient_penalty((logits, aux), images, weight=10)

    Args:
        outputs: what the critic returned for `inputs`: a floating tensor of any shape, or a tuple, list or dict of
            them. All elements are summed.
        inputs: what the critic was given, requiring grad since before it ran: (B, ...) tensor, or a tuple, list or
            dict of them with one norm per sample over all. One that the outputs do not depend on counts as gradient
            zero.
        output_weights: c, in the structure of `outputs`: a number each, or a tensor of the output's shape.
        target, one_sided, eps, weight, reduction, group_size, grad_scale, backend, return_norms: as in
            `fused_gradient_penalty`. With ``target=0, weight=gamma / 2`` this is R1. Outputs that went through
            ``scaler.scale`` already: ask for their gradient yourself, and hand it to `gradient_norm_penalty`.

    There is no `method` here: the critic's graph exists already, and serves double backward only. For the same reason
    this cannot be traced by torch.compile; penalties that are given the critic itself can.

    Returns and derivatives as in `fused_gradient_penalty`; the outputs' graph is kept. No ``.grad`` is written.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes, devices or values do not fit, an input does not require grad, no output depends on any, or
            the critic cannot be differentiated twice: the message names the cause.
    """
    if torch.compiler.is_dynamo_compiling():
        raise ValueError(f"input_gradient_penalty cannot be traced by torch.compile: {_GIVE_THE_CRITIC}")
    outs, structure = arguments.outputs(outputs)
    ins, _ = arguments.samples("inputs", inputs)
    for index, x in enumerate(ins):
        if not x.requires_grad:
            raise ValueError(
                f"{arguments.leaf_name('inputs', inputs, index)} must require grad since before the critic ran, got a "
                "tensor that does not: call requires_grad_() on it first"
            )
    form = arguments.penalty_form(ins[0].shape[0], target, one_sided, eps, weight, reduction, return_norms, group_size)
    if grad_scale is not None:
        form, grad_scale = arguments.score_scale(form, grad_scale, ins)
    ops = backend_for(backend, ins[0])
    factors = [1.0] * len(outs)
    if output_weights is not None:
        factors = arguments.output_weights(output_weights, outputs, outs, structure)
    cotangents = tuple([cotangent(out, grad_scale, factor) for out, factor in zip(outs, factors, strict=True)])
    if torch.is_grad_enabled() and ops is not reference:
        try:
            found = twice_differentiable_gradients(tuple(outs), cotangents, ins, _profile_of_outputs(outs, ins))
        except NotTwiceDifferentiable as error:
            raise ValueError(
                "outputs must come from a critic that can be differentiated twice, got those of one with "
                f"{error.culprit}: {_GIVE_THE_CRITIC}"
            ) from None
    else:
        found = input_gradients(tuple(outs), cotangents, ins, torch.is_grad_enabled(), True)
    gradients = [g for g in found if g is not None]
    if not gradients:
        raise ValueError(
            "outputs must depend on inputs, got outputs that do not: did the critic run on a copy of them, or under "
            "no_grad()?"
        )
    penalty, norms = norm_penalty_rows(gradients, form, ops)
    return (penalty, norms) if return_norms else penalty


def _profile_of_outputs(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> CriticProfile:
    """The profile of the critic that gave these outputs, known by the first parameter that they depend on."""
    samples = {id(x) for x in inputs}
    parameter = next((leaf for leaf in reached_leaves(outputs) if id(leaf) not in samples), None)
    return CriticProfile([]) if parameter is None else profile_by_parameter(parameter)
