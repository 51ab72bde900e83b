"""Playing without learning: the services of an evaluation or of a plain rollout, opened together and closed again."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tinker

from searchr1_async.config import EpisodeLimits, LocalOptions, SamplingSettings
from searchr1_async.episodes.dialect import FORMATS
from searchr1_async.episodes.reward import RewardFunction
from searchr1_async.errors import ConfigurationError, ModelError, RunFolderError, SearchR1Error
from searchr1_async.events import Emit, Notice, RunEnded, RunStarted
from searchr1_async.learn.checkpoints import ResumePoint
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.rollout.opening import open_engine
from searchr1_async.rollout.policy import TinkerPolicy
from searchr1_async.rollout.workers.messages import WorkerSpec
from searchr1_async.run_folder import first_error
from searchr1_async.search import Search
from searchr1_async.service import check_service, open_service
from searchr1_async.training import open_search
from searchr1_async.watch.dashboard import Choice, View, open_view
from searchr1_async.watch.fanout import Watchers
from searchr1_async.watch.viewer.tokens import remember_tokenizer


@asynccontextmanager
async def playing(
    kind: Literal["evaluate", "rollout"],
    search: Search,
    *,
    model: str | None,
    checkpoint: str | Path | None,
    service: str | tinker.ServiceClient | None,
    service_folder: str | Path | None,
    reward: RewardFunction,
    format_name: str,
    renderer: str | None,
    instructions: str | None,
    limits: EpisodeLimits,
    sampling: SamplingSettings,
    group_size: int,
    max_failed_fraction: float,
    local: LocalOptions | None,
    tokenizer: str | None,
    progress: Choice,
    emit: Emit | None,
) -> AsyncIterator[tuple[RolloutEngine, TinkerPolicy]]:
    """An engine and a policy to play with, over services that are closed at the end; arguments as in :func:`searchr1_async.evaluate`."""
    check_format(format_name)
    if group_size < 1:
        raise ConfigurationError(f"{group_size} episodes a question: at least 1")
    found = _find_checkpoint(checkpoint, service_folder)
    view = open_view(progress, title=kind)  # after what is refused: a view that was drawn waits for its work
    try:
        async with AsyncExitStack() as stack:
            watchers = await open_watchers(stack, view, emit)
            stack.push(_ending(watchers))
            folder = found.service_folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="searchr1-")))
            await check_service(service, model or found.base_model, local or LocalOptions())
            await open_search(search, watchers)
            async with (
                search,
                open_service(
                    service,
                    model or found.base_model,
                    folder=folder,
                    local=local or LocalOptions(),
                    emit=watchers,
                    tokenizer=tokenizer,
                ) as connected,
            ):
                remember_tokenizer(connected.tokenizer)
                watchers(
                    RunStarted(
                        kind,
                        connected.model_name,
                        is_embedded=connected.is_local,
                        is_tinker=connected.is_tinker,
                        embedder=search.embedder.name,
                        step=found.step,
                        group_size=group_size,
                    )
                )
                spec = WorkerSpec(
                    format_name,
                    connected.model_name,
                    connected.tokenizer.name_or_path,
                    limits,
                    renderer_name=renderer,
                    instructions=instructions,
                    first_turn=sampling.first_turn,
                )
                async with open_engine(
                    spec,
                    connected.tokenizer,
                    search=search,
                    sampling=sampling,
                    reward=reward,
                    group_size=group_size,
                    max_failed_fraction=max_failed_fraction,
                    emit=watchers,
                    search_metrics=lambda: search.statistics.metrics(),
                ) as engine:
                    client = await connected.create_sampling_client(found.path)
                    yield engine, TinkerPolicy(client, found.step, sampling)
    except* SearchR1Error as group:
        raise first_error(group) from group


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    path: str | None = None
    service_folder: Path | None = None
    base_model: str | None = None
    step: int = 0


def _find_checkpoint(checkpoint: str | Path | None, service_folder: str | Path | None) -> _Checkpoint:
    folder = Path(service_folder) if service_folder is not None else None
    if checkpoint is None:
        return _Checkpoint(service_folder=folder)
    if isinstance(checkpoint, str) and checkpoint.startswith("tinker://"):
        return _Checkpoint(checkpoint, folder)
    point = ResumePoint.load(Path(checkpoint))
    if point is None:
        raise RunFolderError(f"{checkpoint} holds no run: name a run's folder or a tinker:// path")
    if point.sampler_path is None:
        raise RunFolderError(f"the run in {checkpoint} has kept no weights yet (checkpoint_every steps, or its end)")
    own = Path(checkpoint) / "service"
    return _Checkpoint(
        point.sampler_path, folder or (own if own.is_dir() else None), point.base_model, point.sampler_step or 0
    )


def _ending(emit: Emit) -> Callable[..., None]:
    """Says at the end how it came: for an exit stack."""

    def end(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            cause = first_error(error)
            emit(Notice(f"{type(cause).__name__}: {cause}", is_warning=True))
        emit(RunEnded("finished" if kind is None else "failed" if isinstance(error, Exception) else "stopped"))

    return end


async def open_watchers(stack: AsyncExitStack, view: View | None, emit: Emit | None) -> Watchers:
    """Whoever watches some work; the view is closed with the stack."""
    watchers = Watchers()
    if view is not None:
        watchers.subscribe(await stack.enter_async_context(view))
    if emit is not None:
        watchers.subscribe(emit)
    return watchers


def check_format(name: str) -> None:
    """Refuses a tool-call format that there is not.

    Raises:
        ModelError: so.
    """
    if name not in FORMATS:
        raise ModelError(f"unknown tool-call format {name!r}: choose one of {', '.join(FORMATS)}")
