"""Episodes as they cross from a worker: the pool keeps the question and the passages, and each prompt crosses once.

So eight members share one prompt, and passages that the search's cache holds are not copied for every episode that has read
them: a 5-turn episode with 3 passages a search would carry some 15 KB of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from searchr1_async.episodes.types import Episode, Passage, Question, Turn
from searchr1_async.rollout.workers.messages import Played, Reference

Results = tuple[tuple[Passage, ...], ...]


@dataclass(slots=True)
class Packer:
    """The worker's side, of one group."""

    group: int
    _prompt: tuple[int, ...] | None = None
    _known: dict[int, tuple[Reference, tuple[Passage, ...]]] = field(default_factory=dict)
    """By identity; the passages are kept besides, so that no others get the same."""

    def learn(self, search: int, results: Results) -> None:
        """The pool found these, and so has them."""
        for place, passages in enumerate(results):
            if passages:  # the empty tuple is one and the same everywhere
                self._known[id(passages)] = ((search, place), passages)

    def pack(self, member: int, episode: Episode) -> Played:
        """The member's episode, for the channel; it has no reward yet."""
        is_known = episode.prompt_tokens == self._prompt
        self._prompt = episode.prompt_tokens
        return Played(
            group=self.group,
            member=member,
            prompt_tokens=None if is_known else episode.prompt_tokens,
            turns=tuple(_without_results(turn) for turn in episode.turns),
            found=tuple(
                tuple(self._reference(passages) for passages in turn.call.results) if turn.call is not None else ()
                for turn in episode.turns
            ),
            stop_reason=episode.stop_reason,
            answer=episode.answer,
            error=episode.error,
            seconds=episode.seconds,
        )

    def _reference(self, passages: tuple[Passage, ...]) -> Reference | tuple[Passage, ...]:
        known = self._known.get(id(passages))
        return passages if known is None else known[0]


@dataclass(slots=True)
class Unpacker:
    """The pool's side, of one group."""

    question: Question
    found: dict[int, Results] = field(default_factory=dict)
    """What each search of the group found, by its number."""
    _prompt: tuple[int, ...] = ()

    def unpack(self, played: Played) -> Episode:
        """The episode, as it was before it was packed; prompt and passages are shared with others."""
        if played.prompt_tokens is not None and played.prompt_tokens != self._prompt:
            self._prompt = played.prompt_tokens
        return Episode(
            question=self.question,
            prompt_tokens=self._prompt,
            turns=tuple(
                _with_results(turn, found, self.found) for turn, found in zip(played.turns, played.found, strict=True)
            ),
            stop_reason=played.stop_reason,
            answer=played.answer,
            error=played.error,
            seconds=played.seconds,
        )


def _without_results(turn: Turn) -> Turn:
    if turn.call is None or not turn.call.results:
        return turn
    return replace(turn, call=replace(turn.call, results=()))


def _with_results(turn: Turn, found: Sequence[Reference | tuple[Passage, ...]], known: Mapping[int, Results]) -> Turn:
    if turn.call is None or not found:
        return turn
    results = []
    for item in found:
        match item:
            case (int(search), int(place)):
                results.append(known[search][place])
            case _:
                results.append(item)
    return replace(turn, call=replace(turn.call, results=tuple(results)))
