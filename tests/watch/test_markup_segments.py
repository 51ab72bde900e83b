from __future__ import annotations

import time
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.watch.episode_parts import overlaid
from searchr1_async.watch.markup import segments

TAGS = [
    "<think>",
    "</think>",
    "<search>",
    "</search>",
    "<answer>",
    "</answer>",
    "<tool_call>",
    "</tool_call>",
    "<|im_end|>",
]


def cut(text: str, content: str = "") -> list[tuple[str, str]]:
    out, at = [], 0
    for kind, length in segments(text, content):
        out.append((kind, text[at : at + length]))
        at += length
    assert at == len(text)
    return out


def test_all_kinds_are_recognised() -> None:
    assert cut("<think>hm</think>So <search>q</search><|im_end|>") == [
        ("thought", "<think>hm</think>"),
        ("said", "So "),
        ("call", "<search>q</search>"),
        ("markup", "<|im_end|>"),
    ]
    assert cut("<answer>Paris</answer>") == [("answer", "<answer>Paris</answer>")]


def test_a_thought_may_begin_in_the_prompt_or_never_end() -> None:
    assert cut("I see</think>Answer: x") == [("thought", "I see</think>"), ("said", "Answer: x")]
    assert cut("<think>for ever") == [("thought", "<think>for ever")]


def test_without_tags_the_thought_precedes_the_content() -> None:
    assert cut("reasons. Answer: x<|im_end|>", "Answer: x") == [
        ("thought", "reasons. "),
        ("said", "Answer: x"),
        ("markup", "<|im_end|>"),
    ]
    assert cut("Answer: x", "Answer: x") == [("said", "Answer: x")]


@given(st.lists(st.sampled_from([*TAGS, "a", " ", "é"]), max_size=20), st.text(max_size=3))
def test_lengths_add_up(parts: list[str], content: str) -> None:
    text = "".join(parts)
    assert "".join(part for _, part in cut(text, content)) == text


@given(st.text(max_size=30), st.data(), st.integers(0, 40))
def test_overlaid_tokens_preserve_the_text(text: str, data: st.DataObject, limit: int) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *places, len(text)]
    pieces = [(text[a:b], number) for number, (a, b) in enumerate(pairwise(bounds))]
    shown = list(overlaid(text, segments(text), pieces, limit))
    assert "".join(part for _, inside in shown for part, _ in inside) == text[:limit]


def test_hostile_text_takes_linear_time() -> None:
    def seconds(text: str) -> float:
        began = time.perf_counter()
        segments(text, "x")
        return time.perf_counter() - began

    small, large = ("".join(tag * count for tag in TAGS) for count in (2_000, 20_000))
    seconds(small)
    assert seconds(large) < 60 * max(seconds(small), 1e-3)
