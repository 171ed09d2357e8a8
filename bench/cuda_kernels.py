"""The rows of the CUDA table about logits and the head that makes them.

Each function checks first, against the slow path in float64 on a small case and on rows of the very tensors
that are timed, and raises `Wrong`; only then it measures. It gives marks (see `bench.cuda_measure`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cuda_measure import (
    DEVICE,
    Ceilings,
    Left,
    Mark,
    Wrong,
    against,
    close,
    extra_memory,
    in_place_bytes,
    linear_flops,
    logps_bytes,
    mark,
    no_worse,
    random,
    sampled,
    share,
)
from bench.machine import version
from bench.measure import quantile
from nanopost.kernels import (
    cross_entropy,
    dispatch,
    gather_logps,
    linear_logps_chunked,
    linear_logps_single,
)
from nanopost.kernels.linear_cross_entropy import linear_cross_entropy
from nanopost.kernels.linear_logps import linear_logps
from nanopost.losses import entropy, token_logps

VOCABULARIES = (32_000, 128_256, 151_936)
ROWS = 16_384  # of logits: with the largest vocabulary past 2³¹ of them
HEAD = {"rows": 8192, "width": 4096}
LOGPS_VOCABULARY, CE_VOCABULARY = 128_256, 151_936
PART = 16_384  # words of a part, where the slow path would not fit at once
OF_COPY, OF_GEMM, AGAINST = "of copy", "of GEMM", "against Liger"
Outputs = Sequence[Tensor]


def ids(rows: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (rows,), device=DEVICE)


def some(count: int, of: int) -> Tensor:
    """Places at both ends, where offsets are small and where they are large."""
    return torch.cat([torch.arange(count), torch.arange(of - count, of)]).to(DEVICE)


def slow_logps(logits: Tensor, target_ids: Tensor, temperature: float = 1.0) -> Outputs:
    """Log-probabilities, entropies and logsumexps in float64."""
    scores = logits.double() / temperature
    return token_logps(scores, target_ids), entropy(scores), scores.logsumexp(-1)


def compare(name: str, outputs: Outputs, exact: Outputs, *, rtol: float, atol: float) -> None:
    for part, found, wanted in zip(("first", "second", "third"), outputs, exact, strict=False):
        close(f"{name}, {part} result", found, wanted, rtol=rtol, atol=atol)


def gradients(function: Callable[..., Tensor], *leaves: Tensor) -> Outputs:
    """Of the sum of what a function gives, in all of its arguments."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    return torch.autograd.grad(function(*leaves).sum(), leaves)


# ---- logits that are there ---------------------------------------------------------------------------------
@torch.no_grad()
def logps(ceilings: Ceilings, left: Left) -> list[Mark]:
    """`gather_logps` forward: three numbers a row from one read."""
    for dtype in (torch.float32, torch.bfloat16):
        small, y = random(61, 1000, dtype=dtype, scale=4.0), ids(61, 1000)
        found = gather_logps.gather_logps(small, y, temperature=0.7)
        compare(f"61 × 1,000 of {dtype}", found, slow_logps(small, y, 0.7), rtol=1e-5, atol=1e-4)
    marks = []
    for vocabulary in VOCABULARIES:
        y, buffers = ids(ROWS, vocabulary), [random(ROWS, vocabulary, scale=4.0) for _ in range(2)]
        found, part = gather_logps.gather_logps(buffers[0], y), some(16, ROWS)
        exact = slow_logps(buffers[0][part], y[part])
        compare(f"{ROWS:,} × {vocabulary:,}", [x[part] for x in found], exact, rtol=1e-5, atol=1e-4)
        seconds = sampled([partial(gather_logps.gather_logps, x, y) for x in buffers], left)
        work = logps_bytes(ROWS, vocabulary)
        marks.append(share(f"V {vocabulary:,}", work, seconds, ceilings["copy"], OF_COPY, bar=0.9))
        del buffers, found
    return marks


def in_place(ceilings: Ceilings, left: Left) -> list[Mark]:
    """The gradient of `cross_entropy`, written over the logits."""
    for dtype in (torch.float32, torch.bfloat16):
        small, y, pull = random(61, 1000, dtype=dtype, scale=4.0), ids(61, 1000), random(61).float()
        found = gradients(lambda x, y=y, g=pull: g * cross_entropy.cross_entropy(x * 1, y), small)
        exact = gradients(lambda x, y=y, g=pull: g * F.cross_entropy(x, y, reduction="none"), small.double())
        compare(f"61 × 1,000 of {dtype}", found, exact, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-7)
    marks = []
    for vocabulary in VOCABULARIES:
        y, pull, part = ids(ROWS, vocabulary), random(ROWS, dtype=torch.float32), some(16, ROWS)
        buffers = [random(ROWS, vocabulary, scale=4.0) for _ in range(2)]
        rows = buffers[0][part].double()  # before they are overwritten
        losses, totals = cross_entropy.forward(buffers[0], y)
        close("losses", losses[part], -token_logps(rows, y[part]), rtol=1e-5, atol=1e-4)
        found = cross_entropy.gradient_(buffers[0], y, totals, pull)[part]
        exact = gradients(
            lambda x, y=y[part], g=pull[part]: g * F.cross_entropy(x, y, reduction="none"), rows
        )
        name = f"{ROWS:,} × {vocabulary:,}"
        compare(name, [found], exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)
        seconds = sampled([partial(cross_entropy.gradient_, x, y, totals, pull) for x in buffers], left)
        work = in_place_bytes(ROWS, vocabulary)
        marks.append(share(f"V {vocabulary:,}", work, seconds, ceilings["copy"], OF_COPY, bar=0.9))
        del buffers, found
    return marks


# ---- the linear head ---------------------------------------------------------------------------------------
def head_problem(rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head whose logits are about N(0, 2²), targets."""
    return random(rows, width), random(vocabulary, width, scale=2 * width**-0.5), ids(rows, vocabulary)


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ in float64, a part of the vocabulary at a time."""
    return torch.cat([hidden.double() @ w.double().T for w in weight.split(PART)], dim=1)


def check_logps(
    forward: Callable[..., Outputs], hidden: Tensor, weight: Tensor, y: Tensor, part: Tensor
) -> None:
    """Three numbers a row, against float64; the naive program's logits are rounded to bfloat16."""
    found = [x[part] for x in forward(hidden, weight, y, 1.0)]
    exact = slow_logps(wide_logits(hidden[part], weight), y[part])
    naive = slow_logps(F.linear(hidden[part], weight), y[part])
    for name, x, n, e in zip(("log-probs", "entropies", "logsumexps"), found, naive, exact, strict=True):
        no_worse(f"{name} of {len(hidden):,} × {weight.shape[1]:,} × {len(weight):,}", x, n, e)


@torch.no_grad()
def linear(path: str, bar: float, megabytes: float, ceilings: Ceilings, left: Left) -> list[Mark]:
    """Log-probs under a linear head: "chunked", `linear_logps` on a GPU, or the "single" kernel."""
    forward = linear_logps if path == "chunked" else linear_logps_single.forward
    check_logps(forward, *head_problem(61, 64, 1000), some(16, 61))
    hidden, weight, y = head_problem(**HEAD, vocabulary=LOGPS_VOCABULARY)
    if dispatch.head_path(hidden, weight) is not linear_logps_chunked:
        raise Wrong("linear_logps does not take the chunked path on this machine")
    check_logps(forward, hidden, weight, y, some(16, len(hidden)))
    calls = [partial(forward, h, w, y, 1.0) for h, w in ((hidden, weight), (hidden.clone(), weight.clone()))]
    extra = extra_memory(calls[0])
    work = linear_flops(**HEAD, vocabulary=LOGPS_VOCABULARY)
    seconds = sampled(calls, left)
    return [
        share("time", work, seconds, ceilings["gemm"], OF_GEMM, bar=bar),
        mark("memory beside in- and outputs", [extra / 1e6], "MB", bar=megabytes, most=True),
    ]


def step(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, y: Tensor) -> Outputs:
    """Forward and backward of a mean loss: both gradients."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss(*leaves, y).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def mean_loss(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, y).mean()


def naive_loss(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), y)


@torch.no_grad()
def exact_gradients(hidden: Tensor, weight: Tensor, y: Tensor, part: Tensor, words: Tensor) -> Outputs:
    """Of the mean loss, in some rows of hidden and some words of weight; all logsumexps are float32."""
    total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    for w in weight.split(8192):
        total = torch.logaddexp(total, (hidden.float() @ w.float().T).logsumexp(1))
    p = (wide_logits(hidden[part], weight) - total[part, None]).exp()
    p[torch.arange(len(part)), y[part]] -= 1
    rows = torch.zeros_like(hidden[part], dtype=torch.float64)
    for some_p, w in zip(p.split(PART, dim=1), weight.split(PART), strict=True):
        rows += some_p @ w.double()
    q = (hidden.double() @ weight[words].double().T - total[:, None]).exp()
    q -= (y[:, None] == words).double()
    return rows / len(hidden), q.T @ hidden.double() / len(hidden)


def check_gradients(hidden: Tensor, weight: Tensor, y: Tensor) -> None:
    part, words = some(16, len(hidden)), torch.cat([y[:16], ids(48, len(weight))])
    exact = exact_gradients(hidden, weight, y, part, words)
    (h, w), (naive_h, naive_w) = step(mean_loss, hidden, weight, y), step(naive_loss, hidden, weight, y)
    size = f"{len(hidden):,} × {weight.shape[1]:,} × {len(weight):,}"
    no_worse(f"∂L/∂h of {size}", h[part], naive_h[part], exact[0])
    no_worse(f"∂L/∂W of {size}", w[words], naive_w[words], exact[1])


def linear_ce(ceilings: Ceilings, left: Left) -> list[Mark]:
    """`linear_cross_entropy`, the mean over all tokens, forward and backward, against Liger's."""
    check_gradients(*head_problem(61, 64, 1000))
    hidden, weight, y = head_problem(**HEAD, vocabulary=CE_VOCABULARY)
    check_gradients(hidden, weight, y)
    torch.cuda.empty_cache()  # the naive program needs 20 GB
    pairs = [(hidden, weight), (hidden.clone(), weight.clone())]
    seconds = sampled([partial(step, mean_loss, h, w, y) for h, w in pairs], left)
    work = linear_flops(**HEAD, vocabulary=CE_VOCABULARY, products=3)
    marks = [
        mark("time", [1e3 * x for x in seconds], "ms", bar=46.0, most=True, seconds=quantile(seconds, 0.5)),
        share("products", work, seconds, ceilings["gemm"], OF_GEMM),
    ]

    def liger() -> Mark:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        theirs = sampled([partial(step, lambda h, w, y: loss(w, h, y), h, w, y) for h, w in pairs], left)
        paired = [their / our for our, their in zip(seconds, theirs, strict=False)]
        note = f"Liger {version('liger_kernel')}, its default"
        return mark(AGAINST, paired, "×", bar=3.5, seconds=quantile(theirs, 0.5), note=note)

    return [*marks, against(AGAINST, "liger_kernel", 3.5, liger)]
