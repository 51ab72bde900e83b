"""How the run in a folder plays its episodes, so that its weights are used elsewhere as they were trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from searchr1_async.boundary.settings import check_settings
from searchr1_async.boundary.values import shown
from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.errors import RunFolderError
from searchr1_async.models import Thinking
from searchr1_async.search import Search

SEARCH_FILE = "search.json"
"""In a run's folder: how its search is made (:func:`~searchr1_async.search.record.record_of`)."""
_PASSAGES = ("n_results", "max_passage_words")
_LIMITS = tuple(field.name for field in fields(EpisodeLimits))


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeChoice:
    """Settings of episodes. None leaves a setting open, to be taken from elsewhere; see :meth:`completed_by`.

    Raises:
        ConfigurationError: a setting of another type.
    """

    format: str | None = None
    renderer: str | None = None
    thinking: Thinking = None
    instructions: str | None = None
    max_turns: int | None = None
    max_tokens: int | None = None
    max_trajectory_tokens: int | None = None
    max_queries_per_call: int | None = None
    malformed_calls: Literal["end", "tell"] | None = None
    max_seconds: float | None = None
    n_results: int | None = None
    """Passages a query brings."""
    max_passage_words: int | None = None
    """Words after which a passage is cut; 0 leaves it whole."""

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def of_limits(cls, limits: EpisodeLimits | None) -> EpisodeChoice:
        """All of these limits; nothing where there are none."""
        return cls() if limits is None else cls(**asdict(limits))

    def completed_by(self, other: EpisodeChoice) -> EpisodeChoice:
        """This choice; what it leaves open is as in the other."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(other, **mine)

    @property
    def limits(self) -> EpisodeLimits:
        """The limits, with the defaults for those left open.

        Raises:
            ConfigurationError: one out of its range.
        """
        chosen = {name: getattr(self, name) for name in _LIMITS}
        return EpisodeLimits(**{name: value for name, value in chosen.items() if value is not None})

    def play(self) -> dict[str, Any]:
        """As arguments of :class:`~searchr1_async.playing.PlaySettings`, with the recipe's defaults for what is left open.

        Raises:
            ConfigurationError: a limit out of its range.
        """
        return {
            "limits": self.limits,
            "format_name": "hermes" if self.format is None else self.format,
            "renderer_name": self.renderer,
            "thinking": self.thinking,
            "instructions": self.instructions,
            "n_results": self.n_results,
            "max_passage_words": self.max_passage_words,
        }

    def __str__(self) -> str:
        """What is other than the recipe's defaults: ``format='tags', max_turns=3``."""
        usual = {**asdict(RECIPE), "max_passage_words": 0}
        other = {name: value for name, value in asdict(self).items() if value is not None and value != usual[name]}
        return ", ".join(f"{name}={value!r}" for name, value in other.items())


RECIPE = EpisodeChoice.of_limits(EpisodeLimits()).completed_by(EpisodeChoice(format="hermes"))
"""The defaults of the recipe, as far as there are any."""


def named_passages(search: Search | None) -> EpisodeChoice:
    """How many passages a query brings, and how long they are, where the search was made saying so."""
    if search is None:
        return EpisodeChoice()
    return _passages({name: getattr(search.settings, name) for name in _PASSAGES if name in search.named})


def shown_passages(search: Search) -> EpisodeChoice:
    """How many passages a query brings, and how long they are."""
    return _passages({name: getattr(search.settings, name) for name in _PASSAGES})


def _passages(settings: Mapping[str, Any]) -> EpisodeChoice:
    # A search says None where it leaves passages whole.
    words = (settings["max_passage_words"] or 0) if "max_passage_words" in settings else None
    return EpisodeChoice(n_results=settings.get("n_results"), max_passage_words=words)


@dataclass(frozen=True, slots=True)
class TrainedPlay:
    """How a run plays. Its time limit for episodes is not part of it, which keeps batches short, nor its temperature, which every
    measurement chooses and states."""

    episodes: EpisodeChoice
    search_fingerprint: str | None = None
    search_source: str | None = None
    """Where it searches, and with which embedder, in words; None of a run that an earlier version began."""
    unrecorded: tuple[str, ...] = ()
    """Settings that the folder does not hold, as those of earlier versions do not: they had the defaults."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], search: Mapping[str, Any] | None) -> TrainedPlay:
        """Of a run.

        Args:
            settings: of its resume point.
            search: what it kept of its search (:func:`kept_record`).
        """
        limits, search = settings.get("limits") or {}, search or {}
        known = {name: limits[name] for name in _LIMITS if name in limits and name != "max_seconds"}
        known |= {name: settings[name] for name in ("format", "renderer", "instructions") if name in settings}
        given = {"max_seconds", "thinking", *known, *(name for name in _PASSAGES if name in search)}
        thinking = settings.get("thinking", AS_TEMPLATE)  # before there was a choice, the chat template's own way
        return cls(
            EpisodeChoice(**known, thinking=thinking).completed_by(_passages(search)).completed_by(RECIPE),
            settings.get("search"),
            f"{search['source']}, {search['embedder']}" if search else None,
            tuple(each.name for each in fields(EpisodeChoice) if each.name not in given),
        )

    def differences(self, measured: EpisodeChoice) -> dict[str, list[Any]]:
        """Where episodes are played otherwise than in training: the value then and the value now, by name.

        Args:
            measured: with nothing left open but what has no default.
        """
        then, now = asdict(self.episodes), asdict(measured)
        known = [name for name in then if name not in ("max_seconds", *_PASSAGES, *self.unrecorded)]
        known += [name for name in _PASSAGES if name not in self.unrecorded and now[name] is not None]
        return {name: [then[name], now[name]] for name in known if then[name] != now[name]}


def described_differences(differences: Mapping[str, list[Any]]) -> str:
    """For people: ``max_tokens 64 (trained with 28)``."""
    return ", ".join(f"{name} {shown(now)} (trained with {shown(then)})" for name, (then, now) in differences.items())


def kept_record(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder has kept of its search (:func:`~searchr1_async.search.record.record_of`); None where an earlier
    version of the package began it.

    Raises:
        RunFolderError: it cannot be read.
    """
    path = folder / SEARCH_FILE
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"the search in {path} cannot be read: {error}. Pass search=…") from error
