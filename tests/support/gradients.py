"""Gradients of a penalty, as a tuple or as one vector, and how far one vector is from another."""

import torch


def gradients(penalty, inputs):
    """With zeros for inputs that the penalty does not depend on."""
    return torch.autograd.grad(penalty, list(inputs), materialize_grads=True)


def gradient(penalty, critic):
    """With respect to all parameters of the critic, as one fp64 vector."""
    return torch.cat([grad.flatten() for grad in gradients(penalty, critic.parameters())]).double()


def value_and_gradients(penalty, *inputs):
    assert penalty.requires_grad
    return penalty.detach(), *gradients(penalty.sum(), inputs)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()
