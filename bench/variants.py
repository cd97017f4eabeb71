"""The private gradient by several engines: privzoo's, and peers to stand beside them."""

from collections.abc import Callable

import torch
from models import Case

PLAIN = "ordinary"
OURS = "book_keeping"
PEERS = ("ghost_two_pass", "opacus", "opacus_ghost", "micro_batches_of_one")
BY_LAYER = "book_keeping_by_layer"  # group-wise clipping: other sums, less memory
ENGINES = (OURS, BY_LAYER, *PEERS)
VARIANTS = (PLAIN, *ENGINES)


def gradient_of(case: Case, variant: str, clip_norm: float = 1.0) -> Callable[[], dict[str, torch.Tensor]]:
    """Clipped sums by one engine; for the ordinary step, and Opacus' ghost mode, gradients stay in .grad."""
    from privzoo.privacy.clipping import BookKeeping, GhostTwoPass, OpacusHooks

    if variant == PLAIN:
        return lambda: case.losses().sum().backward() or {}
    if variant == "micro_batches_of_one":
        return lambda: one_by_one(case, clip_norm)
    if variant == "opacus_ghost":
        return opacus_ghost(case, clip_norm)
    if variant == BY_LAYER:
        engine = BookKeeping(case.model, groups="layer")
    else:
        engine = {OURS: BookKeeping, "ghost_two_pass": GhostTwoPass, "opacus": OpacusHooks}[variant](case.model)
    return lambda: engine(case.losses, clip_norm).sums


def one_by_one(case: Case, clip_norm: float) -> dict[str, torch.Tensor]:
    """Plain autograd on one example after the other."""
    sums: dict[str, torch.Tensor] = {}
    parameters = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
    for i in range(case.rows):
        found = torch.autograd.grad(case.losses(slice(i, i + 1)).sum(), list(parameters.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        factor = (clip_norm / norm).clamp(max=1.0)
        for name, gradient in gradients.items():
            if name in sums:
                sums[name].add_(gradient * factor)
            else:
                sums[name] = gradient.mul_(factor)
    return sums


def opacus_ghost(case: Case, clip_norm: float) -> Callable[[], dict[str, torch.Tensor]]:
    """Opacus' fast gradient clipping (ghost norms, two backward passes)."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        case.model, batch_first=True, loss_reduction="sum", max_grad_norm=clip_norm, use_ghost_clipping=True
    )

    def gradient() -> dict[str, torch.Tensor]:
        wrapped.enable_hooks()
        losses = case.losses()
        losses.sum().backward(retain_graph=True)
        for parameter in case.model.parameters():
            parameter.grad = None
        factors = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (losses * factors).sum().backward()
        return {}

    return gradient
