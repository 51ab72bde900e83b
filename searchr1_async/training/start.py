"""The start of a run at its service: the weights that it starts from, and the loss that the service supports.

Weights are another run's, a service's, or a PEFT adapter's. The embedded service has every loss; others, Tinker's cloud included,
are tried first, without changing weights, gradients or optimizer. A plain run tries nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import anyio
import tinker
from tinker import types as tinker_types
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

from searchr1_async.boundary.network import SDK_FAULTS, fault_text, fault_words
from searchr1_async.config import LearningSettings, LossName, PipelineSettings
from searchr1_async.episodes.types import Episode, Question, StopReason, Turn
from searchr1_async.errors import ConfigurationError, RunFolderError, ServiceError
from searchr1_async.events import Emit, Notice
from searchr1_async.runs.checkpoints import ResumePoint
from searchr1_async.runs.weights import TINKER_PATH, Step, Weights, find_state, parse_step
from searchr1_async.service.connection import Service, ServiceName, is_embedded, wait_for
from searchr1_async.service.startup import ADAPTER_CONFIG, IMPORT_ROUTE, published_base
from searchr1_async.training.examples import to_datum
from searchr1_async.training.learner import FALLBACK_LOSS

DEFAULT_RANK = 32
"""Rank of a new adapter."""
PROBE_SECONDS = 300.0
"""Seconds per probe."""
_PROMPT = (0, 1)
"""Token ids that every vocabulary has."""
_REFUSING = (400, 404, 405, 422, 501)
"""HTTP statuses that mean the service does not support a request, not that it failed just now."""


@dataclass(frozen=True, slots=True)
class Start:
    """Weights to start from; the optimizer is always new."""

    name: str
    """The user's ``start_from``; a resume must be given the same."""
    state: Weights | None = None
    """A run's state or a ``tinker://`` path; None for an adapter, and for a resumed run, which needs neither."""
    adapter: Path | None = None
    """A PEFT folder."""
    rank: int | None = None
    """LoRA rank; None if only the service knows it."""
    base_model: str | None = None
    """Their base model; None if only the service knows it."""


def find_start(start_from: str | Path, service: ServiceName, out_dir: Path) -> Start:
    """Parses ``start_from``. Reads only small files.

    Args:
        start_from: a run's folder (its last kept weights, or ``"runs/first@best"`` or ``"runs/first@40"`` for a step), a
            ``tinker://RUN/weights/NAME`` path, or a PEFT adapter's folder.
        service: the new run's service.
        out_dir: the new run's folder.

    Raises:
        ConfigurationError: it is none of these, or the service cannot use these weights.
        RunFolderError: the run has not kept this step.
    """
    name = str(start_from)
    if name.startswith(TINKER_PATH):
        return Start(name, find_state(name))
    folder, step = _split_step(name)
    if folder.resolve() == out_dir.resolve():
        raise ConfigurationError(f"start_from is the run's own folder {out_dir}: pass resume=True to continue it")
    if (folder / ADAPTER_CONFIG).is_file():
        if service is None and not is_embedded(service):
            raise ConfigurationError(
                f"start_from={name!r} is a PEFT adapter, which only the embedded service accepts: pass a tinker:// path instead"
            )
        rank, base_model = _read_config(folder)
        return Start(name, adapter=folder, rank=rank, base_model=base_model)
    point = ResumePoint.load(folder) if folder.is_dir() else None
    if point is None:
        raise ConfigurationError(
            f"start_from={name!r} is neither a run's folder nor a PEFT adapter's: pass one of these, or a tinker:// path"
        )
    state = find_state(folder, step)
    if state.service_folder is None and is_embedded(service):
        raise RunFolderError(
            f"the weights of {folder} are on a Tinker service, but this run would use the embedded one"
        )
    if state.service_folder is not None and service is None and not is_embedded(service):
        raise RunFolderError(
            f"the weights of {folder} are on its embedded service, but this run would use the service of TINKER_API_KEY or "
            "TINKER_BASE_URL: unset them"
        )
    return Start(name, state, rank=_rank_of(point), base_model=point.base_model)


def resumed_start(start_from: str | Path, point: ResumePoint) -> Start:
    """The start of a resumed run, whose own weights already contain it; the original need not exist any more."""
    return Start(str(start_from), rank=_rank_of(point), base_model=point.settings.get("model"))


def chosen_rank(lora_rank: int | None, start: Start | None) -> int:
    """The LoRA rank to train with; refuses a ``lora_rank`` other than the weights'."""
    if start is None or start.rank is None:
        return DEFAULT_RANK if lora_rank is None else lora_rank
    if lora_rank not in (None, start.rank):
        raise ConfigurationError(
            f"lora_rank is {lora_rank}, but the weights of start_from={start.name!r} have rank {start.rank}: leave lora_rank out"
        )
    return start.rank


def chosen_model(model: str | None, start: Start | None) -> str | None:
    """The base model to train; refuses a ``model`` other than the weights' base model."""
    found = start.base_model if start is not None else None
    if model is not None and found is not None and published_base(model) != published_base(found):
        raise ConfigurationError(
            f"model is {model!r}, but the weights to start from were trained from {found!r}: leave model out"
        )
    # An adapter names its base model by its public name; only the user knows the service's name for it.
    return model if model is not None or start is None or start.adapter is not None else found


async def open_start(
    start: Start, service: Service, rank: int, emit: Emit
) -> tuple[tinker.TrainingClient, dict[str, Any]]:
    """A training client with these weights and a new optimizer, and the record of them.

    Raises:
        ConfigurationError: their rank or base model differs from the run's.
        ServiceError: the service does not have them, or cannot load them.
    """
    state = start.state
    if start.adapter is not None:
        path = await _import_weights(service, start.adapter)
    else:
        assert state is not None, "a resumed run opens its own state"
        assert state.path is not None
        path = state.path
        if state.service_folder is not None:
            path = await _import_weights(service, state.service_folder, tinker_path=path)
    info = await service.weights_info(path)
    if info.lora_rank is not None and info.lora_rank != rank:
        raise ConfigurationError(
            f"the weights of start_from={start.name!r} have rank {info.lora_rank}, but the run trains with {rank}: pass "
            f"lora_rank={info.lora_rank}"
        )
    if published_base(info.base_model) != published_base(service.model_name):
        raise ConfigurationError(
            f"the weights of start_from={start.name!r} were trained from {info.base_model!r}, but the run trains "
            f"{service.model_name!r}: pass model={info.base_model!r}"
        )
    client = await service.load_weights(path)
    step = state.step if state is not None else None
    emit(Notice(f"starting from {start.name}{'' if step is None else f' (step {step})'}, with a new optimizer"))
    return client, {"name": start.name, "path": path, "step": step, "base_model": info.base_model}


async def _import_weights(service: Service, folder: Path, *, tinker_path: str | None = None) -> str:
    """Copies local weights (a PEFT adapter's folder, or a path within another embedded service's folder) into an embedded
    service's checkpoints; returns their ``tinker://`` path."""
    holder = service.client.holder
    fields = {"folder": str(await anyio.Path(folder).resolve())}
    fields |= {"tinker_path": tinker_path} if tinker_path else {"name": secrets.token_hex(8)}

    async def send() -> Any:
        with holder.aclient(ClientConnectionPoolType.TRAIN) as client:
            return await client.post(f"/api/v1/{IMPORT_ROUTE}", body=fields, cast_to=object)

    try:
        answer = await wait_for(f"importing {folder}", lambda: holder.run_coroutine_threadsafe(send()))
    except ServiceError as error:
        if isinstance(error.__cause__, tinker.NotFoundError) and "does not exist" not in str(error):
            raise ServiceError(
                f"{folder} cannot be imported: only the embedded service loads weights from a folder, and this run uses "
                "another. Pass a tinker:// path of this service."
            ) from error
        raise
    return answer["path"]


def _split_step(name: str) -> tuple[Path, Step]:
    if not Path(name).exists() and "@" in name:
        folder, _, text = name.rpartition("@")
        if (step := parse_step(text)) is not None:
            return Path(folder), step
    return Path(name), "last"


def _rank_of(point: ResumePoint) -> int | None:
    return (point.settings.get("learning") or {}).get("lora_rank")


def _read_config(folder: Path) -> tuple[int, str | None]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        rank, base_model = config["r"], config.get("base_model_name_or_path")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"{folder / ADAPTER_CONFIG} is not an adapter configuration: {type(error).__name__}: {error}"
        ) from error
    if type(rank) is not int or rank < 1 or not isinstance(base_model, str | None):
        raise ConfigurationError(
            f"{folder / ADAPTER_CONFIG} is not a LoRA adapter's: r is {rank!r}, base_model_name_or_path {base_model!r}"
        )
    return rank, base_model


def preferred_losses(learning: LearningSettings, pipeline: PipelineSettings) -> tuple[LossName, ...]:
    """The acceptable losses of a run, best first; see :attr:`LearningSettings.loss`."""
    if learning.loss is not None:
        return (learning.loss,)
    if pipeline.is_off_policy:
        # A loss_config without a loss is meant for the clipped loss.
        return ("ppo",) if learning.loss_config else ("stable_reinforce", "ppo")
    return ("ppo",) if learning.optimizer_steps > 1 else ("importance_sampling",)


async def choose_loss(
    service: Service,
    client: tinker.TrainingClient,
    learning: LearningSettings,
    pipeline: PipelineSettings,
    *,
    point: ResumePoint | None,
    emit: Emit,
) -> LossName:
    """Chooses the run's loss, after checking that the service supports everything the run needs.

    Args:
        client: the run's.
        point: a resumed run's, which keeps its loss.
        emit: receives a notice if there was a choice.

    Raises:
        ConfigurationError: the service lacks something; names it and the alternatives.
        ServiceError: the service does not answer.
    """
    wanted: tuple[LossName, ...] = preferred_losses(learning, pipeline)
    if point is not None:
        wanted = (_loss_of(point, learning, pipeline),)
    refusals: dict[LossName, str] = {}
    if not service.is_local:
        await _refuse_missing(service, client, learning, pipeline)
        if wanted != ("importance_sampling",):
            refusals = await _refusals(client, wanted, learning.loss_config)
    left: list[LossName] = [loss for loss in wanted if loss not in refusals]
    if not left:
        raise ConfigurationError(await _no_loss_message(client, refusals))
    if len(wanted) > 1:
        emit(Notice(_reason(left[0], refusals)))
    return left[0]


def _loss_of(point: ResumePoint, learning: LearningSettings, pipeline: PipelineSettings) -> LossName:
    if point.loss is not None:
        return point.loss
    # A run of an earlier version, with that version's rule.
    if learning.loss is not None:
        return learning.loss
    return "ppo" if pipeline.max_staleness > 0 or learning.optimizer_steps > 1 else "importance_sampling"


def _reason(loss: LossName, refusals: Mapping[LossName, str]) -> str:
    why = "groups may be sampled from older weights"
    if refusals:
        answer = "; ".join(f"no {name}: {refusal}" for name, refusal in refusals.items())
        return f"the loss is {loss}, which is clipped, because {why} (the service has {answer})"
    return f"the loss is {loss}, because {why}"


async def _no_loss_message(client: tinker.TrainingClient, refusals: Mapping[LossName, str]) -> str:
    answers = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
    others: tuple[LossName, ...] = tuple(name for name in get_args(LossName) if name not in refusals)
    lacking = await _refusals(client, others, {}, first_only=False)
    found = [name for name in others if name not in lacking]
    instead = f"it has {', '.join(found)}: choose one with loss=…" if found else "it has none of the others either"
    return f"this service does not support the run's loss ({answers}); {instead}"


async def _refusals(
    client: tinker.TrainingClient,
    losses: tuple[LossName, ...],
    config: Mapping[str, float],
    *,
    first_only: bool = True,
) -> dict[LossName, str]:
    """The losses the service refused, with its messages; with ``first_only`` stops at the first supported loss."""
    refusals: dict[LossName, str] = {}
    for loss in losses:
        refusal = await _refusal(f"the loss {loss}", lambda loss=loss: _compute(client, loss, config))
        if refusal is None and loss == "stable_reinforce":
            refusal = await _refusal(f"the loss {FALLBACK_LOSS}", lambda: _compute(client, FALLBACK_LOSS, {}))
        if refusal is not None:
            refusals[loss] = refusal
        elif first_only:
            break
    return refusals


async def _compute(client: tinker.TrainingClient, loss: LossName, config: Mapping[str, float]) -> None:
    """Computes the loss of one token, without its gradient."""
    turn = Turn(_PROMPT[:1], (-1.0,), "")
    if loss == "stable_reinforce":
        sampler = await client.save_weights_and_get_sampling_client(record_stability_info=True)
        prompt = tinker_types.ModelInput.from_ints(list(_PROMPT))
        sampled = (await sampler.sample(prompt, 1, tinker_types.SamplingParams(max_tokens=1))).sequences[0]
        turn = Turn(tuple(sampled.tokens), tuple(sampled.logprobs or ()), "", sequence_id=sampled.sequence_id)
    episode = Episode(Question("", "?", ("?",)), _PROMPT, (turn,), StopReason.ANSWER)
    datum = to_datum(episode, 1.0, with_ratio_mask=loss == "gspo", with_provenance=loss == "stable_reinforce")
    await client.forward([datum], loss, dict(config) or None)


async def _refuse_missing(
    service: Service, client: tinker.TrainingClient, learning: LearningSettings, pipeline: PipelineSettings
) -> None:
    if pipeline.weights_in_flight == "inflight":

        async def save() -> None:
            await client.save_weights_and_get_sampling_client(kind="inflight")

        if refusal := await _refusal("sampling weights in flight", save):
            raise ConfigurationError(
                f"this service has no sampling clients with in-flight weight updates ({refusal}): choose "
                'weights_in_flight="snapshot"'
            )
    if learning.kl_coefficient:
        base = await service.create_sampling_client()

        async def score() -> None:
            await base.compute_logprobs(tinker_types.ModelInput.from_ints(list(_PROMPT)))

        if refusal := await _refusal("log-probabilities of the base model", score):
            raise ConfigurationError(
                f"this service does not compute log-probabilities of a prompt ({refusal}), which the KL penalty needs: choose "
                "kl_coefficient=0"
            )


async def _refusal(what: str, attempt: Callable[[], Awaitable[None]]) -> str | None:
    """The service's refusal as text, None if it succeeded; :class:`ServiceError` if it failed otherwise."""
    try:
        with anyio.fail_after(PROBE_SECONDS):
            await attempt()
    except tinker.APIStatusError as error:
        if error.status_code not in _REFUSING:
            raise ServiceError(f"trying {what} failed at the Tinker service: {fault_text(error)}") from error
        return fault_words(error)
    except TimeoutError as error:
        raise ServiceError(f"trying {what}: the Tinker service did not answer within {PROBE_SECONDS:g} s") from error
    except (tinker.RequestFailedError, ValueError, AssertionError) as error:
        return fault_words(error)
    except SDK_FAULTS as error:
        raise ServiceError(f"trying {what} failed at the Tinker service: {fault_text(error)}") from error
    return None
