"""Recipes of papers and of PEFT on a language model, re-made in a few lines of torch: its block matmuls get the weights that a recipe
stands for, dense, so that any runtime can judge them. What they would take is counted, not stored.

* SVD-LLM (arXiv 2403.07378, section 3.1): with X the inputs of a layer and S S^T = X X^T (Cholesky), W S = U D V^T is cut after rank r, and
  the factors are U D and V^T S^-1. r is the same share of the weights everywhere. Its second step, fine-tuning of the factors, is not run.
* LoftQ by PEFT's own function (arXiv 2310.08659): NF4 in blocks of 64, rank 16, five alternations; the factors stay float32.

SliceGPT (arXiv 2401.15024) is not here: it turns and cuts the residual stream, which is another model, not other weights of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from loftq import RANK, peft_loftq
from torch import Tensor, nn

SHARE = 0.8
"""Of a matrix's weights that SVD-LLM keeps."""
_DAMPING = 1e-6
"""Of the mean of the diagonal: a moment that float64 cannot factor is no better for it."""
_NF4_BYTES = 0.5 + 4 / 64


def block_linears(module: nn.Module, head: str) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name != head)


def svd_llm(module: nn.Module, head: str, batches: Iterable[Any]) -> int:
    """Bytes of the factors."""
    moments, size = second_moments(module, head, batches), 0
    for name, layer in block_linears(module, head):
        moment = moments[name] + _DAMPING * moments[name].diagonal().mean() * torch.eye(layer.in_features, dtype=torch.float64)
        root = torch.linalg.cholesky(moment)
        u, d, vt = torch.linalg.svd(layer.weight.double() @ root, full_matrices=False)
        rank = int(SHARE * layer.weight.numel() / (layer.in_features + layer.out_features))
        right = torch.linalg.solve_triangular(root, vt[:rank], upper=False, left=False)
        layer.weight.copy_((u[:, :rank] * d[:rank]) @ right)
        size += 4 * rank * (layer.in_features + layer.out_features)
    return size


def second_moments(module: nn.Module, head: str, batches: Iterable[Any]) -> Mapping[str, Tensor]:
    """Sum of X^T X of every layer's inputs, float64; layers that read one tensor share one."""
    found: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            owner = owners.setdefault(name, last[0][1] if last and last[0][0] is given[0] else name)
            last[:] = [(given[0], owner)]
            if owner == name:
                rows = given[0].reshape(-1, given[0].shape[-1])
                found[name] = found.get(name, 0.0) + (rows.T @ rows).double()

        return see

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in block_linears(module, head)]
    for batch in batches:
        module(**batch)
    for handle in handles:
        handle.remove()
    return {name: found[owner] for name, owner in owners.items()}


def loftq_of_peft(module: nn.Module, head: str, batches: Iterable[Any]) -> int:
    """Bytes of codes, block maxima and factors. Raises ImportError where PEFT's function cannot run."""
    init, why = peft_loftq()
    if init is None:
        raise ImportError(why)
    size = 0.0
    for _, layer in block_linears(module, head):
        base, down, up = init(layer.weight.detach().clone(), 4, RANK, 5)
        layer.weight.copy_(base + up @ down)
        size += _NF4_BYTES * layer.weight.numel() + 4 * RANK * (layer.in_features + layer.out_features)
    return round(size)


RECIPES: Mapping[str, Callable[[nn.Module, str, Iterable[Any]], int]] = {
    f"SVD-LLM {SHARE:.0%}": svd_llm,
    f"PEFT LoftQ nf4 r{RANK}": loftq_of_peft,
}
"""Each exchanges the weights of a module in place and gives the bytes that its form of them takes."""
