"""How a run rolls out its episodes, so that its weights can be used the same way elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from searchr1_async.boundary.settings import check_settings, shown
from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.errors import RunFolderError
from searchr1_async.models import Thinking
from searchr1_async.search import Search

SEARCH_FILE = "search.json"
"""File in a run's folder that describes its search (:func:`~searchr1_async.search.record.record_of`)."""
_PASSAGES = ("n_results", "max_passage_words")
_LIMITS = tuple(field.name for field in fields(EpisodeLimits))


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeChoice:
    """Settings of episodes. None leaves a setting open; see :meth:`completed_by`."""

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
    """Passages per query."""
    max_passage_words: int | None = None
    """Words after which a passage is cut; 0: never."""

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def of_limits(cls, limits: EpisodeLimits | None) -> EpisodeChoice:
        """All of these limits; an open choice for None."""
        return cls() if limits is None else cls(**asdict(limits))

    def completed_by(self, other: EpisodeChoice) -> EpisodeChoice:
        """This choice, with open settings taken from the other."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(other, **mine)

    @property
    def limits(self) -> EpisodeLimits:
        """The limits, with defaults for open ones; validates them."""
        chosen = {name: getattr(self, name) for name in _LIMITS}
        return EpisodeLimits(**{name: value for name, value in chosen.items() if value is not None})

    def play(self) -> dict[str, Any]:
        """Arguments of :class:`~searchr1_async.playing.PlaySettings`, with the recipe's defaults for open settings."""
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
        """The settings that differ from the recipe's: ``format='tags', max_turns=3``."""
        usual = {**asdict(RECIPE), "max_passage_words": 0}
        other = {name: value for name, value in asdict(self).items() if value is not None and value != usual[name]}
        return ", ".join(f"{name}={value!r}" for name, value in other.items())


RECIPE = EpisodeChoice.of_limits(EpisodeLimits()).completed_by(EpisodeChoice(format="hermes"))
"""The recipe's defaults."""


def named_passages(search: Search | None) -> EpisodeChoice:
    """Number and length of passages, where the search was created with explicit values."""
    if search is None:
        return EpisodeChoice()
    return _passages({name: getattr(search.settings, name) for name in _PASSAGES if name in search.named})


def shown_passages(search: Search) -> EpisodeChoice:
    """Number and length of passages of a search."""
    return _passages({name: getattr(search.settings, name) for name in _PASSAGES})


def _passages(settings: Mapping[str, Any]) -> EpisodeChoice:
    # A search uses None for whole passages.
    words = (settings["max_passage_words"] or 0) if "max_passage_words" in settings else None
    return EpisodeChoice(n_results=settings.get("n_results"), max_passage_words=words)


@dataclass(frozen=True, slots=True)
class TrainedPlay:
    """How a run rolls out episodes, without its episode time limit (which keeps batches short) and temperature (which every
    evaluation chooses)."""

    episodes: EpisodeChoice
    search_fingerprint: str | None = None
    search_source: str | None = None
    """Description of the search's source and embedder; None for runs of earlier versions."""
    unrecorded: tuple[str, ...] = ()
    """Settings missing in the folder, as in runs of earlier versions: they had the defaults."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], search: Mapping[str, Any] | None) -> TrainedPlay:
        """From the settings of a run's resume point and its search record (:func:`kept_record`)."""
        limits, search = settings.get("limits") or {}, search or {}
        known = {name: limits[name] for name in _LIMITS if name in limits and name != "max_seconds"}
        known |= {name: settings[name] for name in ("format", "renderer", "instructions") if name in settings}
        given = {"max_seconds", "thinking", *known, *(name for name in _PASSAGES if name in search)}
        thinking = settings.get("thinking", AS_TEMPLATE)  # older runs always followed the chat template
        return cls(
            EpisodeChoice(**known, thinking=thinking).completed_by(_passages(search)).completed_by(RECIPE),
            settings.get("search"),
            f"{search['source']}, {search['embedder']}" if search else None,
            tuple(each.name for each in fields(EpisodeChoice) if each.name not in given),
        )

    def differences(self, measured: EpisodeChoice) -> dict[str, list[Any]]:
        """Settings that differ from training, as ``[then, now]`` by name.

        Args:
            measured: leaves open only what has no default.
        """
        then, now = asdict(self.episodes), asdict(measured)
        known = [name for name in then if name not in ("max_seconds", *_PASSAGES, *self.unrecorded)]
        known += [name for name in _PASSAGES if name not in self.unrecorded and now[name] is not None]
        return {name: [then[name], now[name]] for name in known if then[name] != now[name]}


def described_differences(differences: Mapping[str, list[Any]]) -> str:
    """As text: ``max_tokens 64 (trained with 28)``."""
    return ", ".join(f"{name} {shown(now)} (trained with {shown(then)})" for name, (then, now) in differences.items())


def kept_record(folder: Path) -> dict[str, Any] | None:
    """The search record of the run in a folder (:func:`~searchr1_async.search.record.record_of`); None in runs of earlier versions.

    Raises :class:`RunFolderError` if it cannot be read.
    """
    path = folder / SEARCH_FILE
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot read the search record {path}: {error}. Pass search=…") from error
