"""The weights that reinforcement learning starts from: those of ``start_from``, and the demonstrations of the warm-up after it.

``start_from`` names another run's weights, a service's, or a PEFT adapter's. The warm-up trains on demonstrations, which are
scripted episodes with real search; only those whose answer appears in a retrieved passage. Its batches depend on the seed and on
what the search returns; its progress is saved after every step.
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
import tinker

from searchr1_async.boundary.compat import posting
from searchr1_async.boundary.tables import LayoutError
from searchr1_async.config import EpisodeLimits, TrainConfig
from searchr1_async.config.concerns import DEFAULT_RANK
from searchr1_async.data.questions import read_texts
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import SearchTool, play
from searchr1_async.episodes.rewards import cover_match
from searchr1_async.episodes.types import Episode, Question, StopReason, Turn
from searchr1_async.errors import ConfigurationError, QuestionsError, SearchR1Error
from searchr1_async.events import Emit, Notice
from searchr1_async.rollout.engine import FailureBudget
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.runs.weights import TINKER_PATH, Step, Weights, find_state, parse_step, refuse_other_service
from searchr1_async.service.connection import Service, ServiceName, is_embedded, wait_for
from searchr1_async.service.opening import ADAPTER_CONFIG, IMPORT_ROUTE, published_base


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


def find_start(start_from: str | Path, service: ServiceName, out_dir: Path | None = None) -> Start:
    """Parses ``start_from``. Reads only small files.

    Args:
        start_from: a run's folder (its last kept weights, or ``"runs/first@best"`` or ``"runs/first@40"`` for a step), a
            ``tinker://RUN/weights/NAME`` path, or a PEFT adapter's folder.
        service: the new run's service.
        out_dir: the new run's folder, if it is known.
    """
    name = str(start_from)
    if name.startswith(TINKER_PATH):
        return Start(name, find_state(name))
    folder, step = _split_step(name)
    if out_dir is not None and folder.resolve() == out_dir.resolve():
        raise ConfigurationError(f"start_from is the run's own folder {out_dir}: pass resume=True to continue it")
    if (folder / ADAPTER_CONFIG).is_file():
        if service is None and not is_embedded(service):
            raise ConfigurationError(
                f"start_from={name!r} is a PEFT adapter, which only the embedded service accepts: pass a tinker:// path instead"
            )
        found = _read_config(folder)
        return Start(name, adapter=folder, rank=found.r, base_model=found.base_model_name_or_path)
    point = ResumePoint.load(folder) if folder.is_dir() else None
    if point is None:
        raise ConfigurationError(
            f"start_from={name!r} is neither a run's folder nor a PEFT adapter's: pass one of these, or a tinker:// path"
        )
    state = find_state(folder, step)
    refuse_other_service(state, service)
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
            f"lora_rank is {lora_rank}, but the weights of start_from={start.name!r} have rank {start.rank}: pass "
            f"lora_rank={start.rank}"
        )
    return start.rank


def chosen_model(model: str | None, start: Start | None) -> str | None:
    """The base model to train; refuses a ``model`` other than the weights' base model."""
    if start is None or start.base_model is None:
        return model
    if model is None:
        # An adapter names its base model by its public name; only the user knows the service's name for it.
        return start.base_model if start.adapter is None else None
    if published_base(model) != published_base(start.base_model):
        raise ConfigurationError(
            f"model is {model!r}, but the weights of start_from={start.name!r} were trained from {start.base_model!r}: pass "
            f"model={start.base_model!r}"
        )
    return model


async def open_start(
    start: Start, service: Service, rank: int, emit: Emit
) -> tuple[tinker.TrainingClient, dict[str, Any]]:
    """A training client with these weights and a new optimizer, and the record of them."""
    if start.adapter is not None:
        path = await _import_weights(service, start.adapter, name=secrets.token_hex(8))
    else:
        assert start.state is not None, "found by find_start"
        assert start.state.path is not None
        path = start.state.path
        if start.state.service_folder is not None:
            path = await _import_weights(service, start.state.service_folder, tinker_path=path)
    info = await service.weights_info(path)
    found = replace(start, rank=info.lora_rank, base_model=info.base_model)
    chosen_rank(rank, found)
    chosen_model(service.model_name, found)
    client = await service.load_weights(path)
    step = None if start.state is None else start.state.step
    emit(Notice(f"starting from {start.name}{'' if step is None else f' (step {step})'}, with a new optimizer"))
    return client, {"name": start.name, "path": path, "step": step, "base_model": info.base_model}


async def _import_weights(service: Service, folder: Path, **fields: str) -> str:
    """Copies local weights (a PEFT adapter's folder under a ``name``, or a ``tinker_path`` within another embedded service's folder)
    into an embedded service's checkpoints; returns their ``tinker://`` path."""
    fields["folder"] = str(await anyio.Path(folder).resolve())
    doing = f"importing {folder}, which only the embedded service can (elsewhere pass a tinker:// path of the service),"
    return (await wait_for(doing, posting(service.client, IMPORT_ROUTE, fields)))["path"]


def _split_step(name: str) -> tuple[Path, Step]:
    if not Path(name).exists() and "@" in name:
        folder, _, text = name.rpartition("@")
        if (step := parse_step(text)) is not None:
            return Path(folder), step
    return Path(name), "last"


def _rank_of(point: ResumePoint) -> int | None:
    return (point.settings.get("learning") or {}).get("lora_rank")


class _AdapterConfig(msgspec.Struct):
    r: Annotated[int, msgspec.Meta(ge=1)]
    base_model_name_or_path: str | None = None


def _read_config(folder: Path) -> _AdapterConfig:
    try:
        return msgspec.json.decode((folder / ADAPTER_CONFIG).read_bytes(), type=_AdapterConfig)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigurationError(f"{folder / ADAPTER_CONFIG} is not a LoRA adapter's configuration: {error}") from error


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A scripted episode: one search per turn, then a golden answer found in the passages.

    A single string as ``searches`` is the only search.

    Raises:
        QuestionsError: the question has no golden answer.
    """

    question: Question
    searches: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.searches, str):
            object.__setattr__(self, "searches", (self.searches,))
        self.question.check_scorable()

    @classmethod
    def of(cls, question: Question) -> Demonstration:
        """Uses the question's ``search_queries`` metadata, or else the question itself as the only search."""
        given = question.metadata.get("search_queries")
        try:
            return cls(question, read_texts(given) or (question.question,))
        except LayoutError as error:
            raise QuestionsError(f"question {question.id!r} has invalid search_queries: {error}") from error


class DemonstrationPolicy:
    """Policy that writes the scripted turns."""

    def __init__(self, demonstration: Demonstration, dialect: Dialect) -> None:
        self._searches = list(demonstration.searches)
        self._golden = demonstration.question.golden_answers
        self._dialect = dialect

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> Turn:
        """The next search, or a golden answer, preferably one that appears verbatim in the prompt."""
        if self._searches:
            tokens = self._dialect.write_call([self._searches.pop(0)])
        else:
            seen = self._dialect.decode(prompt_tokens)
            literal = [answer for answer in self._golden if answer in seen]
            tokens = self._dialect.write_answer(literal[0] if literal else self._golden[0])
        return Turn(tuple(tokens), (0.0,) * len(tokens), truncated=len(tokens) > max_tokens, policy_version=0)


async def warm_up_batches(
    given: Sequence[Demonstration],
    questions: Sequence[Question],
    config: TrainConfig,
    *,
    dialect: Dialect,
    search: SearchTool,
    emit: Emit,
) -> list[list[Episode]]:
    """The batches of a run's warm-up, from the given demonstrations or, without any, from random questions.

    Raises:
        SearchR1Error: no demonstration found a golden answer.
    """
    warm_up, seed = config.warm_up, config.seed
    assert warm_up is not None
    tried = given
    if not given:
        # Half as many again as are wanted, since a search does not always find the answer.
        count = min(len(questions), warm_up.steps * warm_up.batch_size * 3 // 2)
        tried = [Demonstration.of(one) for one in random.Random(f"demonstrations/{seed}").sample(questions, count)]
    episodes = await play_demonstrations(
        tried,
        dialect=dialect,
        search=search,
        limits=config.episode.limits,
        max_failed_fraction=config.faults.max_failed_fraction,
        max_in_flight=config.sampling.max_episodes_in_flight,
    )
    if not episodes:
        raise SearchR1Error(
            f"none of {len(tried)} demonstrations found a golden answer: check that the corpus answers the questions"
        )
    emit(Notice(f"{len(episodes)} of {len(tried)} demonstrations found their answer and are trained on"))
    return demonstration_batches(episodes, steps=warm_up.steps, batch_size=warm_up.batch_size, seed=seed)


async def play_demonstrations(
    demonstrations: Sequence[Demonstration],
    *,
    dialect: Dialect,
    search: SearchTool,
    limits: EpisodeLimits,
    max_failed_fraction: float = 1.0,
    max_in_flight: int = 2000,
) -> list[Episode]:
    """Runs demonstrations concurrently; returns, in order, those whose answer appears in a retrieved passage."""
    played: dict[int, Episode] = {}
    budget = FailureBudget(len(demonstrations), max_failed_fraction)
    slots = anyio.Semaphore(max_in_flight)

    async def one(place: int, demonstration: Demonstration) -> None:
        policy = DemonstrationPolicy(demonstration, dialect)
        async with slots:
            played[place] = await play(
                demonstration.question, dialect=dialect, policy=policy, search=search, limits=limits
            )
        budget.record(played[place])

    async with anyio.create_task_group() as tasks:
        for place, demonstration in enumerate(demonstrations):
            tasks.start_soon(one, place, demonstration)
    return [played[place] for place in sorted(played) if _is_worth_learning(played[place])]


def _is_worth_learning(episode: Episode) -> bool:
    found = (passage for call in episode.calls for passages in call.results for passage in passages)
    shown = " ".join(f"{passage.title} {passage.text}" for passage in found)
    return episode.stop_reason is StopReason.ANSWER and bool(cover_match(shown, (episode.answer or "",)))


def demonstration_batches(
    episodes: Sequence[Episode], *, steps: int, batch_size: int, seed: int
) -> list[list[Episode]]:
    """``steps`` batches that cycle through all episodes, reshuffled with the seed on each pass."""
    generator = random.Random(f"warm-up/{seed}")

    def endless() -> Iterator[Episode]:
        while True:
            again = list(episodes)
            generator.shuffle(again)
            yield from again

    stream = endless()
    return [list(itertools.islice(stream, batch_size)) for _ in range(steps)]
