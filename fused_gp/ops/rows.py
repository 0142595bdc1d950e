"""Any tensor of B samples as R rows of N elements, in the order in which memory holds them.

A row is a sample, or a group of consecutive samples. A sum over a row does not depend on the order of its elements, and
interpolation is elementwise, so a channels_last tensor is read in storage order instead of being copied. All of these
are differentiable view operations.
"""

from torch import Tensor

Order = tuple[int, ...]


def storage_order(tensor: Tensor) -> Order | None:
    """The permutation, batch first, by falling stride; None where the tensor is contiguous or nearly so."""
    if tensor.ndim <= 2 or tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = (0, *sorted(range(1, tensor.ndim), key=lambda dim: -strides[dim]))
    return None if order == tuple(range(tensor.ndim)) else order


def to_rows(tensor: Tensor, order: Order | None, rows: int) -> Tensor:
    """(B, ...) -> (rows, N) with unit stride inside a row; copies only what has no such view."""
    if tensor.ndim == 2 and tensor.shape[0] == rows and tensor.stride(1) == 1 and not tensor.is_neg():
        return tensor
    if order is not None:
        tensor = tensor.permute(order)
    return unit_stride(tensor.reshape(rows, -1))


def unit_stride(rows: Tensor) -> Tensor:
    """Rows as kernels read them: of unit stride (cotangents are often expanded), without a pending negation."""
    rows = rows.resolve_neg()
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def from_rows(rows: Tensor, order: Order | None, like: Tensor) -> Tensor:
    """(R, N) -> the shape of `like`, the inverse of `to_rows`."""
    if order is None:
        return rows if rows.shape == like.shape else rows.reshape(like.shape)
    shape = [like.shape[dim] for dim in order]
    return rows.reshape(shape).permute([order.index(dim) for dim in range(like.ndim)])
