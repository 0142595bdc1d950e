"""A prototype of attention's second backward, to find the blocks, warps and stages with which a device runs it best.

With S = s Q K', P = exp(S - L), L the logarithm of the sum of each row of exp(S), D the sums over rows of dO o O, and
A, B, C the cotangents of dQ, dK, dV (a dash transposes, o multiplies element by element):

    T  = s (A K' + Q B')        t = sum P o T          dP = dO V'          dS = P o (dP - D)
    G  = (dP - D) o (T - t) + dO C'                    g  = sum P o G      H  = P o (G - g)
    for dO  (P o (T - t)) V + P C                      for V  (P o (T - t))' dO
    for Q   s (H K + dS B)                             for K  s (H' Q + dS' A)

in three passes: the row sums t and g; dO and Q, by blocks of rows; K and V, by blocks of columns. Nothing of size N x N
is kept. The package has no such kernels yet: what is found here is for them.
"""

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load(tensor, at, n, SIZE: tl.constexpr):
    # Rows of (n, SIZE); those past the end are zero.
    return tl.load(tensor + at[:, None] * SIZE + tl.arange(0, SIZE)[None, :], mask=(at < n)[:, None], other=0.0)


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def of_rows(q_, do_, a_, lse_, d_, head, rows, n, SIZE: tl.constexpr):
    first = head * SIZE
    q, do, a = load(q_ + first, rows, n, SIZE), load(do_ + first, rows, n, SIZE), load(a_ + first, rows, n, SIZE)
    # Past the last row L is infinite, so that P is zero.
    lse = tl.load(lse_ + head + rows, mask=rows < n, other=float("inf"))
    return q, do, a, lse, tl.load(d_ + head + rows, mask=rows < n, other=0.0)


@triton.jit
def of_columns(k_, v_, b_, c_, head, columns, n, SIZE: tl.constexpr):
    first = head * SIZE
    k, v = load(k_ + first, columns, n, SIZE), load(v_ + first, columns, n, SIZE)
    return k, v, load(b_ + first, columns, n, SIZE), load(c_ + first, columns, n, SIZE)


@triton.jit
def terms(q, k, v, do, a, b, c, lse, d, columns, n, scale):
    # P, T, dP - D and dO C' of a block of rows and one of columns. Past the last column P is zero: exp(-L) may be
    # infinite there, and infinity times the zeros of K, V, B and C is no number.
    p = tl.exp2(product(q, tl.trans(k)) * (scale * LOG2E) - lse[:, None] * LOG2E)
    p = tl.where((columns < n)[None, :], p, 0.0)
    t = (product(a, tl.trans(k)) + product(q, tl.trans(b))) * scale
    return p, t, product(do, tl.trans(v)) - d[:, None], product(do, tl.trans(c))


@triton.jit
def products_of_p(q, k, v, do, a, b, c, lse, d, t, g, columns, n, scale):
    # P, P o (T - t), H and dS.
    p, t_part, dp, doc = terms(q, k, v, do, a, b, c, lse, d, columns, n, scale)
    bent = t_part - t[:, None]
    return p, p * bent, p * (dp * bent + doc - g[:, None]), p * dp


@triton.jit
def row_sums_kernel(
    q_, k_, v_, do_, a_, b_, c_, lse_, d_, t_, g_, n, scale, SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    head = tl.program_id(1).to(tl.int64) * n
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q, do, a, lse, d = of_rows(q_, do_, a_, lse_, d_, head, rows, n, SIZE)
    t, g = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for begin in range(0, n, COLS):
        columns = begin + tl.arange(0, COLS)
        k, v, b, c = of_columns(k_, v_, b_, c_, head, columns, n, SIZE)
        p, t_part, dp, doc = terms(q, k, v, do, a, b, c, lse, d, columns, n, scale)
        t += tl.sum(p * t_part, axis=1)
        g += tl.sum(p * (dp * t_part + doc), axis=1)  # sum P o (dP - D) is zero, and so t needs not be known
    tl.store(t_ + head + rows, t, mask=rows < n)
    tl.store(g_ + head + rows, g, mask=rows < n)


@triton.jit
def rows_kernel(
    q_, k_, v_, do_, a_, b_, c_, lse_, d_, t_, g_, for_do_, for_q_, n, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64) * n
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q, do, a, lse, d = of_rows(q_, do_, a_, lse_, d_, head, rows, n, SIZE)
    t = tl.load(t_ + head + rows, mask=rows < n, other=0.0)
    g = tl.load(g_ + head + rows, mask=rows < n, other=0.0)
    for_do, for_q = tl.zeros([ROWS, SIZE], tl.float32), tl.zeros([ROWS, SIZE], tl.float32)
    for begin in range(0, n, COLS):
        columns = begin + tl.arange(0, COLS)
        k, v, b, c = of_columns(k_, v_, b_, c_, head, columns, n, SIZE)
        p, p_bent, h, ds = products_of_p(q, k, v, do, a, b, c, lse, d, t, g, columns, n, scale)
        for_do += product(p_bent.to(v.dtype), v) + product(p.to(c.dtype), c)
        for_q += product(h.to(k.dtype), k) + product(ds.to(b.dtype), b)
    at = head * SIZE + rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(for_do_ + at, for_do, mask=(rows < n)[:, None])
    tl.store(for_q_ + at, for_q * scale, mask=(rows < n)[:, None])


@triton.jit
def columns_kernel(
    q_, k_, v_, do_, a_, b_, c_, lse_, d_, t_, g_, for_k_, for_v_, n, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # As above with the two changed about: ROWS columns stay, and blocks of COLS rows pass.
    head = tl.program_id(1).to(tl.int64) * n
    columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k, v, b, c = of_columns(k_, v_, b_, c_, head, columns, n, SIZE)
    for_k, for_v = tl.zeros([ROWS, SIZE], tl.float32), tl.zeros([ROWS, SIZE], tl.float32)
    for begin in range(0, n, COLS):
        rows = begin + tl.arange(0, COLS)
        q, do, a, lse, d = of_rows(q_, do_, a_, lse_, d_, head, rows, n, SIZE)
        t = tl.load(t_ + head + rows, mask=rows < n, other=0.0)
        g = tl.load(g_ + head + rows, mask=rows < n, other=0.0)
        _, p_bent, h, ds = products_of_p(q, k, v, do, a, b, c, lse, d, t, g, columns, n, scale)
        for_v += product(tl.trans(p_bent.to(do.dtype)), do)
        for_k += product(tl.trans(h.to(q.dtype)), q) + product(tl.trans(ds.to(a.dtype)), a)
    at = head * SIZE + columns[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(for_k_ + at, for_k * scale, mask=(columns < n)[:, None])
    tl.store(for_v_ + at, for_v, mask=(columns < n)[:, None])


KERNELS = {"row sums": row_sums_kernel, "rows": rows_kernel, "columns": columns_kernel}


def launch(
    name: str, given: tuple[Tensor, ...], out: list[Tensor], scale: float, rows: int, cols: int, warps: int, stages: int
) -> list[Tensor]:
    """Of contiguous (heads, N, size): q, k, v, do, a, b, c, and (heads, N): lse, d, and for the latter two t, g."""
    heads, n, size = given[0].shape
    KERNELS[name][(triton.cdiv(n, rows), heads)](
        *given, *out, n, scale, SIZE=size, ROWS=rows, COLS=cols, num_warps=warps, num_stages=stages
    )
    return out
