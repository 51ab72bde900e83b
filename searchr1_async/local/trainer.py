"""Training: forward and backward passes in micro-batches of packed sequences, Tinker's losses, and Adam.

A loss is a sum over tokens, not a mean. Formulas and defaults follow Tinker's documentation ("Loss functions"). ``lp`` is the
target's log-probability under the weights being trained, ``q`` its log-probability when sampled, ``A`` the advantage,
``r = exp(lp - q)``:

======================  ===============================================
``cross_entropy``       ``-w · lp``
``importance_sampling`` ``-r · A``
``ppo``                 ``-min(r · A, clip(r, 0.8, 1.2) · A)``
``cispo``               ``-stop_gradient(clip(r, 0, 4)) · A · lp``
``dro``                 ``-(lp · A - β/2 · (lp - q)²)``, β = 0.05
``gspo``                ``-min(s · A, clip(s, 1 - 3e-4, 1 + 4e-4) · A)``
``stable_reinforce``    ``-stop_gradient(w) · A · lp``
======================  ===============================================

gspo is GSPO-token of Zheng et al., 2025, "Group Sequence Policy Optimization": ``s`` has the value of the geometric mean
of ``r`` over the sequence's tokens marked by ``sequence_ratio_mask``, and the gradient of the token's own ``lp``. Tinker
documents no thresholds; the defaults are the paper's.

Tinker's ``stable_reinforce`` formula is not published, so this one is our choice: TOPR of Le Roux et al., 2025, "Tapered
Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs", with token-level weights ``w = clip(r, α, 1)``
for ``A > 0`` and ``w = min(r, 1)`` for ``A < 0``; ``q`` is recorded by the service. Weights in [0, 1] keep a stale token from
moving the model more than a fresh one. A bad token that has become unlikely gets almost no gradient: pushing it down
further is unbounded and breaks plain REINFORCE. A good token that has become unlikely keeps at least weight α (default
1, as in TOPR), since with sparse rewards it is the rare success to keep, and ``lp <= 0`` bounds the push up. α = 0 is
importance sampling truncated at 1. At ``r = 1`` the gradient equals ``importance_sampling``'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from searchr1_async.local.backend import (
    LOSS_INPUTS,
    RATIO_MASK,
    STABLE_REINFORCE,
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackwardResult,
    LossInputs,
    Thresholds,
    UserFault,
    check_data,
    find_inputs,
)
from searchr1_async.local.lora import LoraAdapter, SiteWeights, add_low_rank
from searchr1_async.local.packing import Packed, TreeAttention, micro_batches, pack
from searchr1_async.local.transformer import LeanTransformer, LoraRows

TokenInputs = Mapping[str, Tensor]
_LOG_RATIO = "sequence_log_ratio"
_HEAD_CHUNK = 256
"""Rows of logits in memory at once: 256 x 49,152 floats are 50 MB; more is no faster."""
_NOT_FINITE = (
    "{what} is not finite: the accumulated gradients were cleared, the weights are unchanged. Lower the learning "
    "rate, or look for extreme advantages, weights or log-probabilities in the data."
)


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss that is a sum of one term per token."""

    inputs: LossInputs
    terms: Callable[[Tensor, TokenInputs, Thresholds], Tensor]
    """Terms [tokens] at log-probabilities [tokens]; a sequential loss needs :func:`with_sequence_ratio`'s inputs."""


def _ratio(lp: Tensor, inputs: TokenInputs) -> Tensor:
    return torch.exp(lp - inputs["logprobs"])


def _clipped(ratio: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"])


def _cispo(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    ratio = _ratio(lp.detach(), inputs)
    return -ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"]) * inputs["advantages"] * lp


def _dro(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    return -(lp * inputs["advantages"] - 0.5 * config["beta"] * (lp - inputs["logprobs"]).square())


def _stable_reinforce(lp: Tensor, inputs: TokenInputs, config: Thresholds) -> Tensor:
    weight = _ratio(lp.detach(), inputs).clamp(max=1.0)
    weight = torch.where(inputs["advantages"] > 0, weight.clamp(min=config["alpha"]), weight)
    return -weight * inputs["advantages"] * lp


_TERMS: Mapping[str, Callable[[Tensor, TokenInputs, Thresholds], Tensor]] = {
    "cross_entropy": lambda lp, inputs, config: -inputs["weights"] * lp,
    "importance_sampling": lambda lp, inputs, config: -_ratio(lp, inputs) * inputs["advantages"],
    "ppo": lambda lp, inputs, config: _clipped(_ratio(lp, inputs), inputs, config),
    "cispo": _cispo,
    "dro": _dro,
    "gspo": lambda lp, inputs, config: _clipped(torch.exp(inputs[_LOG_RATIO] + lp - lp.detach()), inputs, config),
    STABLE_REINFORCE: _stable_reinforce,
}
LOSSES: Mapping[str, Loss] = {name: Loss(LOSS_INPUTS[name], terms) for name, terms in _TERMS.items()}


def find_loss(name: str, config: Mapping[str, float]) -> tuple[Loss, Thresholds]:
    """The loss and its configuration with defaults filled in. Raises as :func:`find_inputs`."""
    _, thresholds = find_inputs(name, config)
    return LOSSES[name], thresholds


def with_sequence_ratio(inputs: TokenInputs, logprobs: Tensor, lengths: list[int]) -> TokenInputs:
    """Adds each token's sequence log-ratio (without gradient) to the inputs of a sequential loss.

    ``logprobs`` [tokens] are concatenated sequences of ``lengths`` tokens.
    """
    counts = torch.tensor(lengths, device=logprobs.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=logprobs.device), counts)
    mask = (inputs[RATIO_MASK] != 0).double()
    # Double precision: the mean of thousands of differences is compared with thresholds 3e-4 away from 1.
    difference = mask * (logprobs.detach().double() - inputs["logprobs"].double())
    sums = torch.zeros(2, len(lengths), dtype=torch.float64, device=logprobs.device)
    sums.index_add_(1, sequence, torch.stack([difference, mask]))
    return {**inputs, _LOG_RATIO: (sums[0] / sums[1])[sequence].to(logprobs.dtype)}


def slope_of(logprobs: Tensor, inputs: TokenInputs, loss: Loss, config: Thresholds) -> tuple[float, Tensor]:
    """The summed loss at ``logprobs`` [tokens] and its derivative with respect to each."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        terms = loss.terms(leaf, inputs, config)
        (slope,) = torch.autograd.grad(terms.sum(), leaf)
    return float(terms.detach().double().sum()), slope


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    logprobs: list[Float32Array]
    """[T] per datum, in input order."""
    loss: float


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


class LeanTrainer:
    """Micro-batches over :class:`LeanTransformer`: computes each distinct token once, and logits in chunks."""

    def __init__(self, model: LeanTransformer, *, max_rows: int) -> None:
        """``max_rows``: distinct tokens per micro-batch."""
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
                result[piece.tokens] = self._logprobs(piece)
            loss_inputs = with_sequence_ratio(loss_inputs, result, table.lengths)
        for piece in pieces:
            inputs = {name: values[piece.tokens] for name, values in loss_inputs.items()}
            result[piece.tokens], value = self._run_piece(piece, inputs, loss, config)
            total += value
        return result.cpu().numpy(), total

    def _run_piece(self, piece: _Piece, inputs: TokenInputs, loss: Loss, config: Thresholds) -> tuple[Tensor, float]:
        """Log-probability per token of the piece, and their summed loss; leaves no logits behind."""
        states = self._hidden[piece.rows]
        log_softmax, z = self._log_softmax(states)
        pair_logprobs = log_softmax[piece.pair_rows, piece.targets]
        logprobs = pair_logprobs[piece.pair_of_token]
        value, slope = slope_of(logprobs, inputs, loss, config)
        if piece.has_gradient:
            pair_slope = torch.zeros_like(pair_logprobs).index_add_(0, piece.pair_of_token, slope)
            self._backward(piece, states, log_softmax, z, pair_slope)
        return logprobs, value

    def _pieces(self, table: _TokenTable) -> Iterator[_Piece]:
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

    def _logprobs(self, piece: _Piece) -> Tensor:
        log_softmax, _ = self._log_softmax(self._hidden[piece.rows])
        return log_softmax[piece.pair_rows, piece.targets][piece.pair_of_token]

    def _log_softmax(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the logits, [rows, vocabulary], and the states times the head's A, if it has an update."""
        logits = self._head.forward(states)
        z = None
        if self._site is not None:
            z = states @ self._site.a.to(states.dtype).t()
            add_low_rank(logits, z, self._site.b, self._scale)
        # One fused pass over the logits; logsumexp plus a later softmax would take six.
        return torch.log_softmax(logits.float(), -1), z

    def _backward(
        self, piece: _Piece, states: Tensor, log_softmax: Tensor, z: Tensor | None, pair_slope: Tensor
    ) -> None:
        row_slope = pair_slope.new_zeros(len(piece.rows)).index_add_(0, piece.pair_rows, pair_slope)
        # d lp(target) / d logits = onehot(target) - softmax, summed over the pairs of a row.
        slopes = log_softmax.exp_().mul_(-row_slope.unsqueeze(1))
        slopes.index_put_((piece.pair_rows, piece.targets), pair_slope, accumulate=True)
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
        self.gradient[piece.rows] = gradient


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def _chunks(with_gradient: int, rows: int) -> list[tuple[int, int]]:
    """Row ranges that do not mix rows with and without gradient."""
    edges = [*range(0, with_gradient, _HEAD_CHUNK), *range(with_gradient, rows, _HEAD_CHUNK), rows]
    return list(itertools.pairwise(edges))


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


def adam_step(adapter: LoraAdapter, params: AdamParams) -> dict[str, float]:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019) on the accumulated gradients, which are then cleared.

    Returns metrics. Clients merge them into their own rows, so the names must not clash with ``step`` or ``learning_rate``.
    """
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
