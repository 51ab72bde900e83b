"""Forward and backward passes in micro-batches of packed sequences, and Adam."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from searchr1_async.local.backend import AdamParams, Datum, Float32Array, ForwardBackwardResult, UserFault
from searchr1_async.local.kernels import add_low_rank
from searchr1_async.local.lora import LoraAdapter, SiteWeights
from searchr1_async.local.prefixes import Packed, micro_batches, pack
from searchr1_async.local.torch_losses import Loss, Thresholds, TokenInputs, check_data, find_loss, with_sequence_ratio
from searchr1_async.local.transformer import LeanTransformer, LoraRows, TreeAttention

# Rows of logits in memory at once: 256 x 49,152 floats are 50 MB; more is no faster.
_HEAD_CHUNK = 256


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    logprobs: list[Float32Array]
    """[T] per datum, in input order."""
    loss: float


class LeanTrainer:
    """Micro-batches over :class:`LeanTransformer`: computes each distinct token once, and logits in chunks."""

    def __init__(self, model: LeanTransformer, *, max_rows: int = 1536) -> None:
        """``max_rows``: distinct tokens per micro-batch; about 1.2 MB of activations each for a 135M model."""
        self._model = model
        self._max_rows = max_rows

    @property
    def vocabulary(self) -> int:
        return self._model.head.out_features

    @property
    def context(self) -> int:
        return self._model.shape.context

    def batches(self, data: Sequence[Datum]) -> list[list[int]]:
        return micro_batches([datum.tokens for datum in data], self._max_rows)

    def run(
        self, adapter: LoraAdapter, data: Sequence[Datum], loss: Loss, config: Thresholds, forward_only: bool
    ) -> MicroBatchResult:
        """Runs one micro-batch; accumulates its gradients in the adapter unless ``forward_only``."""
        model, device = self._model, self._model.device
        packed = pack([datum.tokens for datum in data])
        tokens, positions = torch.from_numpy(packed.tokens).to(device), torch.from_numpy(packed.positions).to(device)
        with torch.set_grad_enabled(not forward_only):
            hidden = model.hidden(tokens, positions, TreeAttention(packed, model.shape), [LoraRows(adapter)])
        head = _Head(model, adapter, hidden.detach(), with_gradient=not forward_only)
        logprobs, total = head.run(_TokenTable.build(packed, data, loss, self.vocabulary, device), loss, config)
        if not forward_only and math.isfinite(total) and hidden.requires_grad:
            torch.autograd.backward(hidden, head.gradient)
        lengths = [len(datum.tokens) for datum in data]
        return MicroBatchResult(np.split(logprobs, np.cumsum(lengths)[:-1]), total)


@dataclass(frozen=True, slots=True)
class _TokenTable:
    """A micro-batch's tokens and the rows their log-probabilities are read from.

    A *pair* is a (row, target); group members with a common prefix share pairs.
    """

    inputs: Mapping[str, Tensor]
    """Per-token loss inputs, [tokens]."""
    pair_of_token: Tensor
    pair_row: Tensor
    pair_target: Tensor
    row_has_gradient: Tensor
    """Bool [rows]"""
    lengths: list[int]
    """Tokens per datum."""

    @classmethod
    def build(
        cls, packed: Packed, data: Sequence[Datum], loss: Loss, vocabulary: int, device: torch.device
    ) -> _TokenTable:
        row_of_token = np.concatenate([path.rows() for path in packed.paths])
        target = np.concatenate([np.asarray(datum.loss_inputs["target_tokens"], np.int64) for datum in data])
        pairs, pair_of_token = np.unique(row_of_token * vocabulary + target, return_inverse=True)
        inputs = {
            name: np.concatenate([np.asarray(datum.loss_inputs[name], np.float32) for datum in data])
            for name in loss.inputs.fields
        }
        has_gradient = np.zeros(len(packed.tokens), dtype=bool)
        active = slice(None) if loss.inputs.weight is None else inputs[loss.inputs.weight] != 0.0
        has_gradient[row_of_token[active]] = True

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            {name: put(values) for name, values in inputs.items()},
            put(pair_of_token),
            put(pairs // vocabulary),
            put(pairs % vocabulary),
            put(has_gradient),
            [len(datum.tokens) for datum in data],
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """A chunk of rows whose logits are in memory at once."""

    rows: Tensor
    tokens: Tensor
    """Indices of the tokens read from these rows."""
    pair_rows: Tensor
    """Index into ``rows`` [pairs]"""
    targets: Tensor
    """[pairs]"""
    pair_of_token: Tensor
    """Index into this piece's pairs, per entry of ``tokens``."""
    has_gradient: bool


class _Head:
    """Logits, log-probabilities, loss and its gradient at the last hidden states, chunk by chunk.

    A loss sums one term per token, so each chunk's gradient is computed right after its logits, which are then dropped.
    Rows whose tokens all have zero weight skip the backward pass through the head.
    """

    def __init__(self, model: LeanTransformer, adapter: LoraAdapter, hidden: Tensor, *, with_gradient: bool) -> None:
        self._head = model.head
        self._site: SiteWeights | None = adapter.sites.get("head")
        self._scale = adapter.scale
        self._hidden = hidden
        self._with_gradient = with_gradient
        self.gradient = torch.zeros_like(hidden) if with_gradient else hidden

    @torch.no_grad()
    def run(self, table: _TokenTable, loss: Loss, config: Thresholds) -> tuple[Float32Array, float]:
        """Log-probability per token, and the summed loss."""
        result = torch.empty(len(table.pair_of_token), dtype=torch.float32, device=self._hidden.device)
        total = 0.0
        pieces = list(self._pieces(table))
        loss_inputs = table.inputs
        if loss.inputs.is_sequential:
            # Separate pass: a token's term needs its whole sequence, which spans several chunks.
            for piece in pieces:
                log_softmax = torch.log_softmax(self._logits(self._hidden[piece.rows])[0], -1)
                result[piece.tokens] = log_softmax[piece.pair_rows, piece.targets][piece.pair_of_token]
            loss_inputs = with_sequence_ratio(loss_inputs, result, table.lengths)
        for piece in pieces:
            states = self._hidden[piece.rows]
            logits, z = self._logits(states)
            # One fused pass over the logits; logsumexp plus a later softmax would take six.
            log_softmax = torch.log_softmax(logits, -1)
            pair_logprobs = log_softmax[piece.pair_rows, piece.targets]
            logprobs = pair_logprobs[piece.pair_of_token]
            result[piece.tokens] = logprobs
            inputs = {name: values[piece.tokens] for name, values in loss_inputs.items()}
            value, slope = loss_and_slope(logprobs, inputs, loss, config)
            total += value
            if piece.has_gradient:
                pair_slope = torch.zeros_like(pair_logprobs).index_add_(0, piece.pair_of_token, slope)
                self._backward(piece.rows, states, log_softmax, z, piece.pair_rows, piece.targets, pair_slope)
        return result.cpu().numpy(), total

    def _pieces(self, table: _TokenTable) -> Generator[_Piece, None, None]:
        device = self._hidden.device
        # Rows with a gradient come first, so that the remaining chunks need no backward pass.
        order = torch.argsort(table.row_has_gradient.logical_not(), stable=True)
        place_of_row = _inverse(order)
        place_of_pair = place_of_row[table.pair_row]
        place_of_token = place_of_pair[table.pair_of_token]
        by_pair, by_token = torch.argsort(place_of_pair), torch.argsort(place_of_token)
        sorted_pairs, sorted_tokens = place_of_pair[by_pair], place_of_token[by_token]
        pair_place = _inverse(by_pair)
        with_gradient = int(table.row_has_gradient.sum()) if self._with_gradient else 0
        for start, stop in _chunks(with_gradient, len(order)):
            edges = torch.tensor([start, stop], device=device)
            pair_from, pair_to = torch.searchsorted(sorted_pairs, edges).tolist()
            token_from, token_to = torch.searchsorted(sorted_tokens, edges).tolist()
            pairs, tokens = by_pair[pair_from:pair_to], by_token[token_from:token_to]
            yield _Piece(
                rows=order[start:stop],
                tokens=tokens,
                pair_rows=sorted_pairs[pair_from:pair_to] - start,
                targets=table.pair_target[pairs],
                pair_of_token=pair_place[table.pair_of_token[tokens]] - pair_from,
                has_gradient=start < with_gradient,
            )

    def _logits(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = self._head.forward(states)
        z = None
        if self._site is not None:
            z = states @ self._site.a.to(states.dtype).t()
            add_low_rank(logits, z, self._site.b, self._scale)
        return logits.float(), z

    def _backward(
        self,
        rows: Tensor,
        states: Tensor,
        log_softmax: Tensor,
        z: Tensor | None,
        pair_rows: Tensor,
        targets: Tensor,
        pair_slope: Tensor,
    ) -> None:
        row_slope = pair_slope.new_zeros(len(rows)).index_add_(0, pair_rows, pair_slope)
        # d lp(target) / d logits = onehot(target) - softmax, summed over the pairs of a row.
        slopes = log_softmax.exp_().mul_(-row_slope.unsqueeze(1))
        slopes.index_put_((pair_rows, targets), pair_slope, accumulate=True)
        slopes = slopes.to(states.dtype)
        gradient = self._head.backward(slopes)
        if self._site is not None and z is not None:
            (b,) = self._site.b
            dz = (slopes @ b.to(slopes.dtype)).mul_(self._scale)
            gradient.addmm_(dz, self._site.a.to(dz.dtype))
            assert self._site.a.grad is not None
            assert b.grad is not None
            self._site.a.grad.add_(dz.t() @ states)
            b.grad.add_(slopes.t() @ z, alpha=self._scale)
        self.gradient[rows] = gradient


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def _chunks(with_gradient: int, rows: int) -> list[tuple[int, int]]:
    """Row ranges that do not mix rows with and without gradient."""
    edges = [*range(0, with_gradient, _HEAD_CHUNK), *range(with_gradient, rows, _HEAD_CHUNK), rows]
    return list(itertools.pairwise(edges))


def loss_and_slope(logprobs: Tensor, inputs: TokenInputs, loss: Loss, config: Thresholds) -> tuple[float, Tensor]:
    """The summed loss at ``logprobs`` [tokens] and its derivative with respect to each."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        terms = loss.terms(leaf, inputs, config)
        (slope,) = torch.autograd.grad(terms.sum(), leaf)
    return float(terms.detach().double().sum()), slope


class Trainer(Protocol):
    @property
    def vocabulary(self) -> int: ...

    @property
    def context(self) -> int: ...

    def batches(self, data: Sequence[Datum]) -> list[list[int]]:
        """Indices into ``data``, per micro-batch."""
        ...

    def run(
        self, adapter: LoraAdapter, data: Sequence[Datum], loss: Loss, config: Thresholds, forward_only: bool
    ) -> MicroBatchResult:
        """Runs one micro-batch; accumulates its gradients in the adapter unless ``forward_only``."""
        ...


def forward_backward(
    trainer: Trainer,
    adapter: LoraAdapter,
    data: Sequence[Datum],
    loss_fn: str,
    loss_config: Mapping[str, float],
    forward_only: bool,
) -> Generator[None, None, ForwardBackwardResult]:
    """Runs a whole request, yielding after each micro-batch so that other work can run in between.

    Raises :class:`UserFault` for bad input (before any computation), or for a loss or gradient that is not finite, after
    clearing the adapter's accumulated gradients.
    """
    loss, config = find_loss(loss_fn, loss_config)
    check_data(data, loss_fn, loss.inputs, trainer.vocabulary, trainer.context)
    logprobs: list[Float32Array | None] = [None] * len(data)
    total = 0.0
    if not forward_only:
        adapter.gradient_is_zero = False
    try:
        for indices in trainer.batches(data):
            result = trainer.run(adapter, [data[i] for i in indices], loss, config, forward_only)
            for index, values in zip(indices, result.logprobs, strict=True):
                logprobs[index] = values
            total += result.loss
            if not math.isfinite(result.loss):
                raise UserFault(_NOT_FINITE.format(what=f"The loss {loss_fn!r}"))
            yield
        if not forward_only and not bool(torch.isfinite(adapter.gradient).all()):
            raise UserFault(_NOT_FINITE.format(what=f"The gradient of {loss_fn!r}"))
    except BaseException:
        if not forward_only:
            adapter.clear_gradient()
        raise
    return ForwardBackwardResult(tuple(values for values in logprobs if values is not None), {"loss:sum": total})


_NOT_FINITE = (
    "{what} is not finite: the accumulated gradients were cleared, the weights are unchanged. Lower the learning "
    "rate, or look for extreme advantages, weights or log-probabilities in the data."
)


def adam_step(adapter: LoraAdapter, params: AdamParams) -> dict[str, float]:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019) on the accumulated gradients, which are then cleared.

    Returns metrics. Clients merge them into their own rows, so the names must not clash with ``step`` or ``learning_rate``.
    Raises :class:`UserFault` if a parameter is out of range.
    """
    _check_adam(params)
    gradient, (mean, square) = adapter.gradient, adapter.moments
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    clipped = 0.0 < params.grad_clip_norm < norm
    if clipped:
        gradient.mul_(params.grad_clip_norm / norm)
    adapter.step += 1
    mean.lerp_(gradient, 1.0 - params.beta1)
    square.mul_(params.beta2).addcmul_(gradient, gradient, value=1.0 - params.beta2)
    if params.weight_decay:
        adapter.flat.mul_(1.0 - params.learning_rate * params.weight_decay)
    denominator = square.sqrt().div_(math.sqrt(1.0 - params.beta2**adapter.step)).add_(params.eps)
    adapter.flat.addcdiv_(mean, denominator, value=-params.learning_rate / (1.0 - params.beta1**adapter.step))
    adapter.clear_gradient()
    return {
        "grad_norm": norm,
        "grad_clipped": float(clipped),
        "optimizer_steps": float(adapter.step),
        "weight_norm": float(torch.linalg.vector_norm(adapter.flat, dtype=torch.float64)),
    }


def _check_adam(params: AdamParams) -> None:
    ranges = {
        "learning_rate": (params.learning_rate, 0.0, math.inf),
        "beta1": (params.beta1, 0.0, 1.0),
        "beta2": (params.beta2, 0.0, 1.0),
        "eps": (params.eps, 0.0, math.inf),
        "weight_decay": (params.weight_decay, 0.0, math.inf),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value < high:
            raise UserFault(f"adam_params.{name} is {value}; it must lie in [{low:g}, {high:g}).")
    if not math.isfinite(params.grad_clip_norm):
        raise UserFault(f"adam_params.grad_clip_norm is {params.grad_clip_norm}; it must be finite.")
