"""The answer to one question, with the episode that led to it: shows itself in a notebook's cell and in a terminal."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from searchr1_async.episodes.types import Episode, Passage, SearchCall
from searchr1_async.watch.viewer import episode_html, episode_text


@dataclass(frozen=True, repr=False)
class Answer:
    """What :func:`searchr1_async.ask` returns.

    In a notebook's cell it shows the question, the answer, and every turn with its searches and their passages; ``print(answer)``
    shows the same in a terminal.
    """

    episode: Episode
    """As it was played, token for token. It has no reward: the question has no golden answer."""
    checkpoint: str | None = None
    """``tinker://`` path of the weights that answered; None for the base model, and for the newest weights of a run under way,
    which need not be saved."""
    step: int | None = None
    """Optimiser steps done before these weights; None where it is not known."""

    @property
    def question(self) -> str:
        """As it was asked."""
        return self.episode.question.question

    @property
    def answer(self) -> str | None:
        """What the model answered; None where the episode ended without an answer (``episode.stop_reason`` says why)."""
        return self.episode.answer

    @property
    def searches(self) -> tuple[SearchCall, ...]:
        """The model's tool calls in order, malformed ones included (``problem`` says what was wrong)."""
        return self.episode.calls

    @property
    def passages(self) -> tuple[Passage, ...]:
        """What the searches found, in the order found, each passage once."""
        found = (passage for call in self.searches for passages in call.results for passage in passages)
        return tuple({passage.id: passage for passage in found}.values())

    def _repr_mimebundle_(
        self, include: Container[str] | None = None, exclude: Container[str] | None = None
    ) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": episode_html(self.episode)}

    def __str__(self) -> str:
        return episode_text(self.episode)

    def __repr__(self) -> str:
        count = len(self.searches)
        return f"Answer({self.question!r}: {self.answer!r}, {count} search{'' if count == 1 else 'es'})"
