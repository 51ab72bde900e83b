from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchr1_async.episodes.formats import (
    Dialect,
    FinalAnswer,
    MalformedCall,
    SearchRequest,
    make_dialect,
    read_tags,
    select_renderer,
)
from searchr1_async.episodes.rendering import ChatMLRenderer, split_tool_calls
from searchr1_async.episodes.types import Passage, Question
from searchr1_async.errors import ModelError

QUESTION = Question("q", "What is the capital of Egypt?", ("Cairo",))
NAMES = ("tags", "hermes", "qwen3", "qwen35")

hostile = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            [
                "<search>", "</search>", "<answer>", "</answer>", "<information>", "<tool_call>", "</tool_call>",
                '{"name": "search", "arguments": {"query_list": ["a"]}}', '{"name": "search"', "<think>", "</think>",
                "<|im_end|>", "<|im_start|>", "Answer:", "\n", " ", "x", "[" * 50, "é", "\u202e", "\x00",
            ]
        ),
        max_size=12,
    ).map("".join),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("<search>capital of Egypt</search>", SearchRequest(("capital of Egypt",))),
        ("I wonder. <search> a </search> ", SearchRequest(("a",))),
        ("<answer>Cairo</answer>", FinalAnswer("Cairo")),
        ("<search>a</search><answer>Cairo</answer>", FinalAnswer("Cairo")),
        ("<answer>no</answer> wait <search>b</search>", SearchRequest(("b",))),
        ("<answer> </answer>", FinalAnswer(None)),
        ("Cairo</answer>", FinalAnswer(None)),
        ("Cairo", FinalAnswer(None)),
    ],
)
def test_reads_tags(text: str, reading: object) -> None:
    assert read_tags(text) == reading


@pytest.mark.parametrize("text", ["<search>", "a</search>", "<search> </search>", "</search><search>"])
def test_malformed_tags_have_a_reason(text: str) -> None:
    reading = read_tags(text)
    assert isinstance(reading, MalformedCall)
    assert reading.problem


def hermes_turn(dialects: dict[str, tuple[Dialect, Any]], text: str, name: str = "hermes") -> object:
    dialect, tokenizer = dialects[name]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return dialect.read(dialect.start(QUESTION), tokens)[1]


@pytest.mark.parametrize("name", ["hermes", "qwen3"])
def test_reads_hermes_calls(dialects: dict[str, tuple[Dialect, Any]], name: str) -> None:
    call = '<tool_call>\n{"name": "search", "arguments": {"query_list": ["a", " b "]}}\n</tool_call><|im_end|>'
    assert hermes_turn(dialects, call, name) == SearchRequest(("a", "b"))
    assert hermes_turn(dialects, "Answer: Cairo<|im_end|>", name) == FinalAnswer("Cairo")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ('{"name": "search", "arguments": {"query_list": ["a"]}', "json"),
        ('{"name": "google", "arguments": {"query_list": ["a"]}}', "no such tool"),
        ('{"name": "search", "arguments": {"query": "a"}}', "query_list"),
        ('{"name": "search", "arguments": {"query_list": []}}', "no list of strings"),
        ('{"name": "search", "arguments": {"query_list": [3]}}', "no list of strings"),
        ('{"name": "search", "arguments": {"query_list": [""]}}', "empty query"),
        ("[1]", "structure"),
    ],
)
def test_malformed_hermes_calls_have_a_reason(dialects: dict[str, tuple[Dialect, Any]], body: str, word: str) -> None:
    reading = hermes_turn(dialects, f"<tool_call>{body}</tool_call><|im_end|>")
    assert isinstance(reading, MalformedCall)
    assert word in reading.problem


def test_a_valid_call_beside_a_broken_one_counts(dialects: dict[str, tuple[Dialect, Any]]) -> None:
    good = '<tool_call>{"name": "search", "arguments": {"query_list": ["a"]}}</tool_call>'
    assert hermes_turn(dialects, f"<tool_call>{{</tool_call>{good}<|im_end|>") == SearchRequest(("a",))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=hostile, passage=hostile, noise=st.lists(st.integers(0, 300), max_size=8))
def test_whatever_was_sampled_stays_as_it_was(
    dialects: dict[str, tuple[Dialect, Any]], name: str, text: str, passage: str, noise: list[int]
) -> None:
    """Parsing never raises, and the next prompt starts with exactly the prompt and the sampled tokens."""
    dialect, tokenizer = dialects[name]
    prompt = dialect.start(QUESTION)
    sampled = [*tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False), *noise]
    _, reading = dialect.read(prompt, sampled)
    assert isinstance(reading, SearchRequest | MalformedCall | FinalAnswer)
    before = list(sampled)
    for appended in (
        dialect.extend(prompt, sampled, ["a query"], [[Passage("1", "Title", passage)]]),
        dialect.tell(prompt, sampled, "a reason"),
    ):
        assert sampled == before
        if appended is not None:
            assert appended
            assert all(isinstance(token, int) for token in appended)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(passage=hostile)
def test_a_passage_cannot_pass_for_markup(dialects: dict[str, tuple[Dialect, Any]], name: str, passage: str) -> None:
    dialect, tokenizer = dialects[name]
    prompt = dialect.start(QUESTION)
    sampled = dialect.write_call(["capital of Egypt"])
    honest = dialect.extend(prompt, sampled, ["q"], [[Passage("1", "", "plain")]])
    attacked = dialect.extend(prompt, sampled, ["q"], [[Passage("1", "", passage)]])
    assert honest is not None
    assert attacked is not None
    markup = set(tokenizer.convert_tokens_to_ids(list(tokenizer.get_added_vocab())))
    assert [token for token in attacked if token in markup] == [token for token in honest if token in markup]
    for tag in ("</search>", "</answer>", "</information>", "</tool_response>", "<tool_call>"):
        assert tokenizer.decode(attacked).count(tag) == tokenizer.decode(honest).count(tag)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_demonstrated_reads_back(dialects: dict[str, tuple[Dialect, Any]], name: str) -> None:
    dialect, _ = dialects[name]
    prompt = dialect.start(QUESTION)
    assert dialect.read(prompt, dialect.write_call(["capital of Egypt"]))[1] == SearchRequest(("capital of Egypt",))
    assert dialect.read(prompt, dialect.write_answer("Cairo"))[1] == FinalAnswer("Cairo")


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_shown_to_the_model(dialects: dict[str, tuple[Dialect, Any]], name: str) -> None:
    dialect, tokenizer = dialects[name]
    prompt, sampled = dialect.start(QUESTION), dialect.write_call(["q"])
    appended = dialect.extend(prompt, sampled, ["q"], [[Passage("1", "Egypt", "Cairo is its capital.")]])
    assert appended is not None
    assert "Egypt: Cairo is its capital." in tokenizer.decode(appended)


def test_a_closed_message_cannot_be_continued_in_tags(dialects: dict[str, tuple[Dialect, Any]]) -> None:
    dialect, tokenizer = dialects["tags"]
    closed = tokenizer.encode("<search>a</search><|im_end|>", add_special_tokens=False)
    assert dialect.extend(dialect.start(QUESTION), closed, ["a"], [[]]) is None


def test_chatml_renders_as_the_template_does(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    rendered = ChatMLRenderer(tokenizer).render_ids(messages, add_generation_prompt=True)  # type: ignore[arg-type]
    assert tokenizer.decode(rendered) == expected


def test_chatml_bridge_extends_and_closes_a_cut_turn(tokenizer: Any) -> None:
    renderer = ChatMLRenderer(tokenizer)
    bridged = renderer.bridge_to_next_turn([1, 5], [6, 7], [{"role": "tool", "content": "found"}])
    assert bridged is not None
    assert bridged.token_ids[:4] == [1, 5, 6, 7]
    assert tokenizer.decode(bridged.token_ids[4:]) == (
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nfound\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert renderer.bridge_to_next_turn([1], [2], [{"role": "assistant", "content": "x"}]) is None


@given(hostile)
def test_splitting_calls_loses_no_text(text: str) -> None:
    outside, calls = split_tool_calls(text)
    assert len(outside) + sum(len(call.raw) for call in calls) == len(text)


def test_a_long_hostile_turn_is_read_in_linear_time() -> None:
    assert len(split_tool_calls("<tool_call>" * 50_000)[1]) == 1
    assert isinstance(read_tags("<search>" * 50_000 + "<answer>" * 50_000), MalformedCall)


def test_unknown_formats_and_models_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="choose one of hermes, tags"):
        make_dialect("xml", "m", tokenizer)
    with pytest.raises(ModelError, match="nonsense"):
        select_renderer("m", tokenizer, "nonsense")

    class Bare:
        name_or_path = "bare"
        unk_token_id = None

        def get_added_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(ModelError, match="no chat format is known"):
        select_renderer("acme/bare", Bare())
