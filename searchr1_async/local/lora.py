"""LoRA adapters: layout, weights, gradients and checkpoint names."""

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
from searchr1_async.local.model_files import LORA_ALPHA, matrix_name

_MEAN, _SQUARE, _STEP = "optimizer.mean.", "optimizer.square.", "optimizer.step"


@dataclass(frozen=True, slots=True)
class LoraSite:
    """Projections with a shared input and thus one stacked A; each has its own B."""

    key: str
    """The model's lookup key: ``3.qkv``, ``head``, …"""
    in_features: int
    parts: tuple[tuple[str, int], ...]
    """Hugging Face module path and output size."""
    kind: str
    """``attn``, ``mlp`` or ``unembed``: the :class:`LoraConfig` flag that enables it."""


@dataclass(frozen=True, slots=True)
class SiteWeights:
    a: Tensor
    """[parts · rank, in]: the parts' A's, stacked."""
    b: tuple[Tensor, ...]
    """[out, rank] per part."""


class LoraLayout:
    """An adapter's sites and the offset of each matrix in one flat vector.

    With one vector, snapshot, clipping and optimizer step are a few operations regardless of depth.
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
        """PEFT matrix name to offset and shape. A site's A's are adjacent, in the order of its parts."""
        offset = 0
        for site in self.sites:
            shapes = [(path, "A", (config.rank, site.in_features)) for path, _ in site.parts]
            shapes += [(path, "B", (out, config.rank)) for path, out in site.parts]
            for path, letter, shape in shapes:
                self.names[matrix_name(path, letter)] = (offset, shape)
                offset += shape[0] * shape[1]
        self.size = offset

    def views(self, flat: Tensor) -> dict[str, SiteWeights]:
        """Each site's matrices as views of ``flat`` [size]."""
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
        """A's uniform in ±1/sqrt(in) (kaiming-uniform with a = sqrt(5)), B's zero."""
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
        """The flat vector from named matrices. Raises :class:`UserFault` if one is missing or has the wrong shape."""
        flat = np.empty(self.size, dtype=np.float32)
        for name, (offset, shape) in self.names.items():
            matrix = state.get(prefix + name)
            if matrix is None or matrix.shape != shape:
                found = "is missing" if matrix is None else f"has shape {list(matrix.shape)}"
                raise UserFault(
                    f"The checkpoint does not fit this model and lora_config: {prefix + name} {found}, "
                    f"expected {list(shape)}."
                )
            flat[offset : offset + matrix.size] = matrix.reshape(-1)
        return torch.from_numpy(flat)


class LoraWeights:
    """Immutable sampler weights (a snapshot). Compared by identity."""

    def __init__(self, layout: LoraLayout, flat: Tensor) -> None:
        self.layout = layout
        self.flat = flat
        self.sites = layout.views(flat)

    @property
    def scale(self) -> float:
        return self.layout.scale


class LoraAdapter:
    """Trainable weights, gradients and Adam moments, each one flat vector."""

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
        """Adam's running means of the gradient and its square."""
        return torch.zeros_like(self.flat), torch.zeros_like(self.flat)

    @cached_property
    def sites(self) -> dict[str, SiteWeights]:
        """Autograd leaves that share memory with ``flat``; their gradients share memory with ``gradient``."""
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
        """The weights by PEFT name and, with ``optimizer``, Adam's moments and step count."""
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

        Raises :class:`UserFault` if the state does not fit or lacks the requested moments.
        """
        adapter = cls(layout, layout.from_state(state).to(device))
        if optimizer:
            if _STEP not in state:
                raise UserFault("The checkpoint has no optimizer state; load it without the optimizer.")
            mean, square = adapter.moments
            mean.copy_(layout.from_state(state, _MEAN))
            square.copy_(layout.from_state(state, _SQUARE))
            adapter.step = int(state[_STEP][0])
        return adapter


def _leaf(view: Tensor, gradient: Tensor) -> Tensor:
    leaf = view.detach().requires_grad_()
    leaf.grad = gradient
    return leaf
