"""Time the kernels against their alternatives, forward and backward.

    python bench/kernels.py [--batch 256] [--features 256] [--rounds 31] [--only TEXT] [--cold]

Contenders: this package; the reference, eager and under torch.compile; torch.addmm for the
correlation; torch.linalg.eigh and eig for the root; for the whole step, the code released with the
paper (per view one update and one non-symmetric eigendecomposition, W and its root materialised,
autograd through everything); and, only on a GPU, torch's layers for the pooled stem on --batch
images per view. Without a GPU this times the CPU path, the closed-form reference. Nothing is timed
while a test of the operations fails. Results go to bench/results/kernels-NNN.csv and .png.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator

import harness
import torch
from harness import Contender, Question, Work
from torch import Tensor, nn
from torch.nn.functional import batch_norm, max_pool2d

from isofast_kernels import (
    asymmetric_loss_pair,
    correlation_ema_,
    matrix_power,
    reference,
)
from isofast_kernels.dispatch import INTERPRET

ALPHA, DECAY = 0.5, 0.998
KIND = {"metric": "cosine", "isotropic": True}
TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in ("reference", "ops", "triton", "step", "matrix_power", "norm_pool")
]


class Problem:
    """Two views, two targets and a correlation, as in training."""

    def __init__(self, rows: int, features: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(0)
        slope = torch.logspace(0, -2, features)
        z = torch.randn(4, rows, features, generator=generator) * slope
        self.z1, self.z2, self.t1, self.t2 = z.to(self.device, dtype).unbind()
        self.z1, self.z2 = (x.clone().requires_grad_() for x in (self.z1, self.z2))
        self.corr = torch.zeros(features, features, device=self.device)
        correlation_ema_(self.corr, [self.z1, self.z2], 0.0)
        self.w = matrix_power(self.corr, ALPHA)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.z1, self.z2))

    def work(self, *tensors: Tensor, products: int = 0) -> Work:
        """Count each tensor once, and ``products`` products of both views with a D x D matrix."""
        rows, features = self.z1.shape
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return Work(moved, products * 2 * 2 * rows * features**2)


def reference_loss(problem: Problem, w_DD: Tensor) -> Tensor:
    """Return the loss in both directions by its definition, for autograd."""
    p = problem
    one = reference.losses_reference(p.z1, p.t2, w_DD, **KIND).mean()
    return one + reference.losses_reference(p.z2, p.t1, w_DD, **KIND).mean()


def released_step(problem: Problem, corr_DD: Tensor) -> tuple[Tensor, ...]:
    """The released code's operations in its order (2e8d364, directpred.py and isoloss.py)."""
    loss = torch.zeros((), device=problem.device)
    for z_BD, t_BD in ((problem.z1, problem.t2), (problem.z2, problem.t1)):
        z_BD, t_BD = z_BD.float(), t_BD.float()
        scaled_BD = z_BD.detach() / len(z_BD) ** 0.5
        corr_DD.copy_(corr_DD * DECAY + scaled_BD.T @ scaled_BD * (1 - DECAY))
        s_D, u_DD = torch.linalg.eig(corr_DD)
        s_D, u_DD = s_D.real, u_DD.real
        s_D = (s_D.clamp(min=0) / s_D.max() + 0.0) ** ALPHA
        w_DD = u_DD @ (torch.diag(s_D) @ u_DD.T)
        root_DD = u_DD @ (torch.diag(s_D**0.5) @ u_DD.T)
        q_BD, p_BD = z_BD @ root_DD, z_BD @ w_DD
        near_B = (z_BD * t_BD).sum(1) / (p_BD.norm(dim=1) * t_BD.norm(dim=1)).detach()
        pull_B = (p_BD * t_BD).sum(1) / (p_BD.norm(dim=1) ** 3 * t_BD.norm(dim=1))
        loss = loss - 2 * (near_B - 0.5 * pull_B.detach() * q_BD.norm(dim=1) ** 2).mean()
    return loss, *problem.gradients(loss)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Capture ``call`` in a CUDA graph; return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ours(call: Callable[[], object]) -> Iterator[Contender]:
    """Yield this package; on a GPU also as a CUDA graph."""
    if torch.cuda.is_available():
        yield Contender("isofast, CUDA graph", captured(call))
        yield Contender("isofast, Triton", call)
    else:
        yield Contender("isofast, CPU path", call, "no GPU: closed-form reference, not Triton")


def correlation_contenders(p: Problem) -> tuple[list[Contender], Work]:
    views = [p.z1.detach(), p.z2.detach()]
    joined = torch.cat(views).float()

    def addmm() -> Tensor:
        scale = (1 - DECAY) / len(joined)
        return torch.addmm(p.corr, joined.T, joined, beta=DECAY, alpha=scale, out=p.corr)

    compiled = torch.compile(reference.correlation_ema_reference_)
    return [
        *ours(lambda: correlation_ema_(p.corr, views, DECAY)),
        Contender("torch.addmm (fp32, views joined)", addmm, "not symmetric; join not timed"),
        Contender(
            "reference, eager",
            lambda: reference.correlation_ema_reference_(p.corr, views, DECAY),
        ),
        Contender("reference, torch.compile", lambda: compiled(p.corr, views, DECAY)),
    ], p.work(*views, p.corr, p.corr, products=1)


def power_contenders(p: Problem) -> tuple[list[Contender], Work]:
    def by_eig() -> Tensor:
        s_D, u_DD = torch.linalg.eig(p.corr)
        s_D = s_D.real.clamp_min(0)
        return u_DD.real @ torch.diag((s_D / s_D.max()) ** ALPHA) @ u_DD.real.T

    return [
        *ours(lambda: matrix_power(p.corr, ALPHA)),
        Contender(
            "torch.linalg.eigh (reference)",
            lambda: reference.matrix_power_reference(p.corr, ALPHA),
        ),
        Contender("torch.linalg.eig", by_eig),
    ], p.work(p.corr, p.w)


def loss_contenders(p: Problem) -> tuple[list[Contender], Work]:
    def fused() -> tuple[Tensor, ...]:
        return p.gradients(asymmetric_loss_pair(p.z1, p.z2, p.t1, p.t2, p.w, **KIND))

    compiled = torch.compile(lambda w_DD: reference_loss(p, w_DD))
    return [
        *ours(fused),
        Contender("reference, eager autograd", lambda: p.gradients(reference_loss(p, p.w))),
        Contender("reference, torch.compile", lambda: p.gradients(compiled(p.w))),
    ], p.work(p.z1, p.z2, p.t1, p.t2, p.w, p.z1, p.z2, products=1)


def step_contenders(p: Problem) -> tuple[list[Contender], Work]:
    views = [p.z1.detach(), p.z2.detach()]

    def fused() -> tuple[Tensor, ...]:
        correlation_ema_(p.corr, views, DECAY)
        w_DD = matrix_power(p.corr, ALPHA)
        return p.gradients(asymmetric_loss_pair(p.z1, p.z2, p.t1, p.t2, w_DD, **KIND))

    def by_reference(loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        reference.correlation_ema_reference_(p.corr, views, DECAY)
        return p.gradients(loss_of(reference.matrix_power_reference(p.corr, ALPHA)))

    compiled_loss = torch.compile(lambda w_DD: reference_loss(p, w_DD))
    released_corr = p.corr.clone()
    return [
        *ours(fused),
        Contender("reference, eager", lambda: by_reference(lambda w_DD: reference_loss(p, w_DD))),
        Contender("reference, torch.compile + eigh", lambda: by_reference(compiled_loss)),
        Contender("the released code's way", lambda: released_step(p, released_corr)),
    ], p.work(p.z1, p.z2, p.t1, p.t2, p.z1, p.z2, p.corr, p.corr, products=2)


def stem_contenders(p: Problem) -> tuple[list[Contender], Work]:
    # needs isofast's dependencies, which the kernels do not
    from isofast.methods.batch_norm import convert_batch_norm

    x = torch.randn(2 * len(p.z1), 64, 64, 64, device=p.device, dtype=p.z1.dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    fused = convert_batch_norm(nn.BatchNorm2d(64, device=p.device), views=2, fused=True)
    dy = torch.ones_like(max_pool2d(x, 3, 2, 1))

    def both(layers: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(layers(x), [x, *fused.parameters()], dy)

    def joined(x: Tensor) -> Tensor:
        return fused(x, pool=True)

    def separate(x: Tensor) -> Tensor:
        return max_pool2d(fused(x, relu=True), 3, 2, 1)

    def torchs(x: Tensor) -> Tensor:
        views = [
            batch_norm(view, None, None, fused.weight, fused.bias, True) for view in x.chunk(2)
        ]
        return max_pool2d(torch.cat(views).relu(), 3, 2, 1)

    theirs = both(torch.compile(separate))
    return [
        *ours(both(torch.compile(joined))),
        Contender("layers apart, torch.compile, CUDA graph", captured(theirs)),
        Contender("layers apart, torch.compile", theirs),
        Contender("torch's layers, eager", both(torchs)),
        Contender("torch's layers, torch.compile", both(torch.compile(torchs))),
    ], p.work(x, x, dy, dy, dy, x, x, x)


QUESTIONS = {
    "correlation": ("correlation, two views", correlation_contenders),
    "matrix power": ("C^0.5, normalised", power_contenders),
    "loss": ("iso cosine loss, both ways, forward + backward", loss_contenders),
    "step": ("correlation + C^0.5 + loss, forward + backward", step_contenders),
    "stem": ("BatchNorm + ReLU + max pool of 64 x 64 x 64, forward + backward", stem_contenders),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="rows per view")
    parser.add_argument("--features", type=int, default=256, help="D")
    parser.add_argument("--rounds", type=int, default=31, help="n")
    parser.add_argument("--only", default="", help="only operations whose name contains this")
    parser.add_argument("--cold", action="store_true", help="flush the caches before each call")
    options = parser.parse_args(arguments)
    if INTERPRET:
        parser.error("TRITON_INTERPRET=1 times the interpreter; unset it")
    if not torch.cuda.is_available():
        print("no GPU: timing the CPU path")
    stem = torch.cuda.is_available() and importlib.util.find_spec("pydantic") is not None
    problem = Problem(options.batch, options.features)
    questions = [
        Question(
            f"{question}, B={options.batch} D={options.features}{', cold cache' * options.cold}",
            TESTS,
            functools.partial(contenders_of, problem),
        )
        for name, (question, contenders_of) in QUESTIONS.items()
        if options.only in name and (name != "stem" or stem)
    ]
    if not questions:
        parser.error(f"no operation's name contains {options.only!r}: {', '.join(QUESTIONS)}")
    return harness.run("kernels", questions, options.rounds, cold=options.cold)


if __name__ == "__main__":
    sys.exit(main())
