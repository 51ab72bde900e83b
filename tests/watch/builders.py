"""Small episodes and groups for tests."""

from __future__ import annotations

from collections.abc import Sequence

from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn

HOSTILE = "<script>alert(1)</script>\x00\x1b[31m \u202eevil\u202c \ud83d\ude00 \udcff </pre>&amp;"


def question(name: str = "q0", source: str = "atlas", **metadata: object) -> Question:
    return Question(name, f"What is the capital of {name}?", ("Paris", "City of Light"), source, metadata)


def searching_turn(passage_text: str = "Paris is large.", *, sampled: int = 3, appended: int = 4) -> Turn:
    return Turn(
        sampled_tokens=tuple(range(sampled)),
        logprobs=tuple(-0.5 * (index + 1) for index in range(sampled)),
        text="<tool_call>search</tool_call>",
        content="search",
        policy_version=1,
        call=SearchCall(("capital",), ((Passage("p1", "France", passage_text, 0.75),),), None, 0.25),
        appended_tokens=tuple(range(100, 100 + appended)),
        seconds=1.5,
        sequence_id="request-1:0",
        cached_prompt_tokens=4,
    )


def malformed_turn() -> Turn:
    return Turn((7,), (-1.0,), "<tool_call>{", "", 1, SearchCall((), problem="not JSON"), ())


def answering_turn(text: str = "Answer: Paris", sampled: int = 2) -> Turn:
    return Turn(tuple(range(sampled)), (-0.25,) * sampled, text, text, 2, seconds=0.5)


def episode(
    asked: Question | None = None,
    *,
    correct: float = 1.0,
    turns: Sequence[Turn] | None = None,
    stop_reason: StopReason = StopReason.ANSWER,
    parts: dict[str, float] | None = None,
) -> Episode:
    failed = stop_reason is StopReason.FAILED
    return Episode(
        question=asked or question(),
        prompt_tokens=(1, 2, 3, 4, 5),
        turns=tuple(turns) if turns is not None else (searching_turn(), answering_turn()),
        stop_reason=stop_reason,
        answer="Paris" if correct else None,
        reward=0.0 if failed else correct,
        reward_parts={} if failed else {"correct": correct, "format": 1.0, "f1": correct, **(parts or {})},
        error="SearchError: the store is gone" if failed else None,
        seconds=2.5,
    )


def group(asked: Question | None = None, corrects: Sequence[float] = (1.0, 0.0), failed: int = 0) -> Group:
    asked = asked or question()
    return Group(
        asked,
        tuple(episode(asked, correct=correct) for correct in corrects),
        tuple(episode(asked, stop_reason=StopReason.FAILED, turns=()) for _ in range(failed)),
    )
