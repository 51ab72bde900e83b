"""Low-rank adapters: where they sit, how they are stored, and how they are named in a checkpoint."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchr1_async.local.backend import LoraConfig, UserFault
from searchr1_async.local.peft_files import LORA_ALPHA, matrix_name

_MEAN, _SQUARE, _STEP = "optimizer.mean.", "optimizer.square.", "optimizer.step"


@dataclass(frozen=True, slots=True)
class LoraSite:
    """Projections that share one input, hence one stacked A; each has its own B."""

    key: str
    """Where the model looks it up: ``3.qkv``, ``head``, …"""
    in_features: int
    parts: tuple[tuple[str, int], ...]
    """Module path as Hugging Face names it, and its number of outputs."""
    kind: str
    """``attn``, ``mlp`` or ``unembed``: what of :class:`LoraConfig` switches it on."""


@dataclass(frozen=True, slots=True)
class SiteWeights:
    a: Tensor
    """[parts · rank, in]: the parts' A's one below the other."""
    b: tuple[Tensor, ...]
    """One [out, rank] a part."""


class LoraLayout:
    """Which sites an adapter has and where each matrix lies in its one flat vector.

    One vector makes copying (a snapshot), clipping and the optimiser's step a handful of operations, whatever the depth.
    """

    def __init__(self, sites: Sequence[LoraSite], config: LoraConfig) -> None:
        if not 1 <= config.rank <= 1024:
            raise UserFault(f"lora_config.rank is {config.rank}; it must lie between 1 and 1024.")
        switched = {"attn": config.train_attn, "mlp": config.train_mlp, "unembed": config.train_unembed}
        self.config = config
        self.sites = tuple(site for site in sites if switched[site.kind])
        if not self.sites:
            raise UserFault("lora_config trains nothing: set train_attn, train_mlp or train_unembed.")
        self.scale = LORA_ALPHA / config.rank
        self.names: dict[str, tuple[int, tuple[int, int]]] = {}
        """PEFT's name of each matrix: offset and shape. The A's of one site are adjacent, in the order of its parts."""
        offset = 0
        for site in self.sites:
            shapes = [(path, "A", (config.rank, site.in_features)) for path, _ in site.parts]
            shapes += [(path, "B", (out, config.rank)) for path, out in site.parts]
            for path, letter, shape in shapes:
                self.names[matrix_name(path, letter)] = (offset, shape)
                offset += shape[0] * shape[1]
        self.size = offset

    def views(self, flat: Tensor) -> dict[str, SiteWeights]:
        """The sites' matrices as views of ``flat`` [size]."""
        rank, offset, views = self.config.rank, 0, {}

        def take(rows: int, columns: int) -> Tensor:
            nonlocal offset
            view = flat[offset : offset + rows * columns].view(rows, columns)
            offset += rows * columns
            return view

        for site in self.sites:
            a = take(len(site.parts) * rank, site.in_features)
            views[site.key] = SiteWeights(a, tuple(take(out, rank) for _, out in site.parts))
        return views

    def initial(self) -> Tensor:
        """A's uniform in ±1/sqrt(in), as kaiming-uniform with a = sqrt(5) makes them; B's zero."""
        seed = self.config.seed if self.config.seed is not None else secrets.randbits(62)
        generator = torch.Generator().manual_seed(seed % 2**63)
        flat = torch.zeros(self.size)
        for site in self.views(flat).values():
            bound = 1.0 / math.sqrt(site.a.shape[1])
            site.a.uniform_(-bound, bound, generator=generator)
        return flat

    def to_state(self, flat: Tensor, prefix: str = "") -> dict[str, NDArray[Any]]:
        array = flat.detach().cpu().numpy()
        return {
            prefix + name: array[offset : offset + rows * columns].reshape(rows, columns).copy()
            for name, (offset, (rows, columns)) in self.names.items()
        }

    def from_state(self, state: Mapping[str, NDArray[Any]], prefix: str = "") -> Tensor:
        """The flat vector from named matrices.

        Raises:
            UserFault: a matrix is missing or of another shape, so the checkpoint is of another model or rank.
        """
        flat = np.empty(self.size, dtype=np.float32)
        for name, (offset, shape) in self.names.items():
            matrix = state.get(prefix + name)
            if matrix is None or matrix.shape != shape:
                found = "is missing" if matrix is None else f"has shape {list(matrix.shape)}"
                raise UserFault(
                    f"The checkpoint does not fit this model and lora_config: {prefix + name} {found}, "
                    f"wanted {list(shape)}."
                )
            flat[offset : offset + matrix.size] = matrix.reshape(-1)
        return torch.from_numpy(flat)


class LoraWeights:
    """Immutable sampler weights: what :meth:`Backend.snapshot` hands out. Compared by identity."""

    def __init__(self, layout: LoraLayout, flat: Tensor) -> None:
        self.layout = layout
        self.flat = flat
        self.sites = layout.views(flat)

    @property
    def scale(self) -> float:
        return self.layout.scale


class LoraAdapter:
    """Trainable weights with their gradients and Adam's moments, each one flat vector."""

    def __init__(self, layout: LoraLayout, flat: Tensor) -> None:
        self.layout = layout
        self.flat = flat
        self.gradient = torch.zeros_like(flat)
        self.gradient_is_zero = True
        self.step = 0

    @property
    def lora(self) -> LoraConfig:
        return self.layout.config

    @property
    def scale(self) -> float:
        return self.layout.scale

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Adam's running averages of the gradient and of its square."""
        return torch.zeros_like(self.flat), torch.zeros_like(self.flat)

    @cached_property
    def sites(self) -> dict[str, SiteWeights]:
        """Leaves of autograd that share memory with ``flat``; their gradients share memory with ``gradient``."""
        weights, gradients = self.layout.views(self.flat), self.layout.views(self.gradient)
        return {
            key: SiteWeights(
                _leaf(site.a, gradients[key].a),
                tuple(_leaf(b, g) for b, g in zip(site.b, gradients[key].b, strict=True)),
            )
            for key, site in weights.items()
        }

    def clear_gradient(self) -> None:
        self.gradient.zero_()
        self.gradient_is_zero = True

    def frozen_copy(self) -> LoraWeights:
        return LoraWeights(self.layout, self.flat.clone())

    def export(self, optimizer: bool) -> dict[str, NDArray[Any]]:
        """The weights by PEFT's names and, if asked for, Adam's moments and step count."""
        state = self.layout.to_state(self.flat)
        if optimizer:
            mean, square = self.moments
            state |= self.layout.to_state(mean, _MEAN) | self.layout.to_state(square, _SQUARE)
            state[_STEP] = np.array([self.step], dtype=np.int64)
        return state

    @classmethod
    def restore(
        cls, layout: LoraLayout, state: Mapping[str, NDArray[Any]], optimizer: bool, device: torch.device
    ) -> LoraAdapter:
        """The inverse of :meth:`export`; without ``optimizer`` the moments start at zero.

        Raises:
            UserFault: the state does not fit, or holds no moments though they are asked for.
        """
        adapter = cls(layout, layout.from_state(state).to(device))
        if optimizer:
            if _STEP not in state:
                raise UserFault("The checkpoint holds no optimiser state; load it without.")
            mean, square = adapter.moments
            mean.copy_(layout.from_state(state, _MEAN))
            square.copy_(layout.from_state(state, _SQUARE))
            adapter.step = int(state[_STEP][0])
        return adapter


def _leaf(view: Tensor, gradient: Tensor) -> Tensor:
    leaf = view.detach().requires_grad_()
    leaf.grad = gradient
    return leaf
