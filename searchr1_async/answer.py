"""The answer to one question with its episode, with rich display in a notebook."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from searchr1_async.episodes.types import Episode, Passage, SearchCall
from searchr1_async.watch.viewer import episode_html, episode_text


@dataclass(frozen=True, repr=False)
class Answer:
    """What :func:`searchr1_async.ask` returns.

    In a notebook cell or with ``print(answer)`` it shows the question, the answer, and every turn with its searches and passages.
    """

    episode: Episode
    """The episode, token by token, without a reward."""
    checkpoint: str | None = None
    """``tinker://`` path of the weights; None for the base model, and for the newest weights of a running run, which may be
    unsaved."""
    step: int | None = None
    """Optimiser steps behind the weights; None if unknown."""

    @property
    def question(self) -> str:
        """The question's text."""
        return self.episode.question.question

    @property
    def answer(self) -> str | None:
        """The model's answer; None if the episode ended without one (see ``episode.stop_reason``)."""
        return self.episode.answer

    @property
    def searches(self) -> tuple[SearchCall, ...]:
        """The model's tool calls in order, malformed ones included (``problem`` says what is wrong)."""
        return self.episode.calls

    @property
    def passages(self) -> tuple[Passage, ...]:
        """The passages found, in order, each once."""
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
