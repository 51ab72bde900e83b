"""Compact episodes for the channel: question and passages stay in the pool, and a group's prompt is sent once.

Members share one prompt object, and passages in the search cache are not copied per episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, Turn
from searchr1_async.rollout.workers.messages import Played, Reference

Results = tuple[tuple[Passage, ...], ...]


@dataclass(slots=True)
class Packer:
    """Worker side of one group."""

    group: int
    _prompt: tuple[int, ...] | None = None
    _known: dict[int, tuple[Reference, tuple[Passage, ...]]] = field(default_factory=dict)
    """By ``id``; keeping the passages keeps the ids unique."""

    def learn(self, search: int, results: Results) -> None:
        for place, passages in enumerate(results):
            if passages:  # the empty tuple is a shared object
                self._known[id(passages)] = ((search, place), passages)

    def pack(self, member: int, episode: Episode) -> Played:
        """Packs a member's episode, not yet scored."""
        is_known = episode.prompt_tokens == self._prompt
        self._prompt = episode.prompt_tokens
        return Played(
            group=self.group,
            member=member,
            prompt_tokens=None if is_known else episode.prompt_tokens,
            turns=tuple(_turn_with(turn, _without_results(turn.call)) for turn in episode.turns),
            found=tuple(self._references(turn.call) for turn in episode.turns),
            stop_reason=episode.stop_reason,
            answer=episode.answer,
            error=episode.error,
            seconds=episode.seconds,
            given=_without_results(episode.given),
            given_found=self._references(episode.given),
        )

    def _references(self, call: SearchCall | None) -> tuple[Reference | tuple[Passage, ...], ...]:
        return () if call is None else tuple(map(self._reference, call.results))

    def _reference(self, passages: tuple[Passage, ...]) -> Reference | tuple[Passage, ...]:
        known = self._known.get(id(passages))
        return passages if known is None else known[0]


@dataclass(slots=True)
class Unpacker:
    """Pool side of one group."""

    question: Question
    found: dict[int, Results] = field(default_factory=dict)
    """Results by search number."""
    _prompt: tuple[int, ...] = ()

    def unpack(self, played: Played) -> Episode:
        """Restores an episode; prompt and passages are shared objects."""
        if played.prompt_tokens is not None and played.prompt_tokens != self._prompt:
            self._prompt = played.prompt_tokens
        return Episode(
            question=self.question,
            prompt_tokens=self._prompt,
            turns=tuple(
                _turn_with(turn, _with_results(turn.call, found, self.found))
                for turn, found in zip(played.turns, played.found, strict=True)
            ),
            stop_reason=played.stop_reason,
            answer=played.answer,
            error=played.error,
            seconds=played.seconds,
            given=_with_results(played.given, played.given_found, self.found),
        )


def _turn_with(turn: Turn, call: SearchCall | None) -> Turn:
    return turn if call is turn.call else replace(turn, call=call)


def _without_results(call: SearchCall | None) -> SearchCall | None:
    return call if call is None or not call.results else replace(call, results=())


def _with_results(
    call: SearchCall | None, found: Sequence[Reference | tuple[Passage, ...]], known: Mapping[int, Results]
) -> SearchCall | None:
    if call is None or not found:
        return call
    results = []
    for item in found:
        match item:
            case (int(search), int(place)):
                results.append(known[search][place])
            case _:
                results.append(item)
    return replace(call, results=tuple(results))
