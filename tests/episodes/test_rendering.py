"""Every known model is rendered in its own format and thinking mode, token-exact over turns, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from searchr1_async.episodes.formats import SEARCH_TOOL, FinalAnswer, SearchRequest, make_dialect
from searchr1_async.episodes.rendering import AS_TEMPLATE, check_thinking, known_format, select_renderer
from searchr1_async.episodes.types import Passage, Question
from searchr1_async.errors import ModelError
from searchr1_async.models import find_format, find_model, known_models
from searchr1_async.testing import make_tiny_tokenizer
from tests.episodes.stand_in import chat_template, rebuilt, stand_in, write_harmony_vocabulary

QUESTION = Question("q", "Who wrote it?", ("Austen",))
FOUND = [[Passage("1", "Emma", "A novel by Austen.")]]
ASSISTANT = "<|im_start|>assistant\n"
OFF, OPEN = f"{ASSISTANT}<think>\n\n</think>\n\n", f"{ASSISTANT}<think>\n"
NEMOTRON = {"off": f"{ASSISTANT}<think></think>", "on": OPEN}
LANDMARKS: dict[str, tuple[str, dict[str, str]]] = {
    # The renderer, and the end of the prompt per thinking mode.
    "qwen3": ("Qwen3Renderer", {"off": OFF, "on": f"<|im_end|>\n{ASSISTANT}"}),
    "qwen3-instruct": ("Qwen3VLRenderer", {"off": f"<|im_end|>\n{ASSISTANT}"}),
    "qwen3-vl": ("Qwen3VLRenderer", {"off": f"<|im_end|>\n{ASSISTANT}"}),
    "qwen3.5": ("Qwen35Renderer", {"off": OFF, "on": OPEN}),
    "qwen3.6": ("Qwen36Renderer", {"off": OFF, "on": OPEN}),
    "qwen3.8": ("Qwen38Renderer", {"off": OFF, "on": OPEN, "low": OPEN, "medium": OPEN, "xhigh": OPEN}),
    "nemotron-3": ("Nemotron3Renderer", NEMOTRON),
    "nemotron-3-super": ("Nemotron3Renderer", NEMOTRON),
    "nemotron-3-ultra": ("Nemotron3UltraRenderer", NEMOTRON),
    "nemotron-3.5": ("Nemotron35Renderer", NEMOTRON),
    "kimi-k2.5": (
        "KimiK25Renderer",
        {
            "off": "<|im_assistant|>assistant<|im_middle|><think></think>",
            "on": "<|im_assistant|>assistant<|im_middle|><think>",
        },
    ),
    "glm-5.3": ("GLM53Renderer", dict.fromkeys(("low", "high", "max"), "<|assistant|><think>")),
    "inkling": (
        "InklingRenderer",
        dict.fromkeys(("off", "on", "minimal", "low", "medium", "high", "max"), "<|end_message|><|message_model|>"),
    ),
    "llama-3": ("Llama3Renderer", {"off": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"}),
    "gpt-oss": (
        "GptOssRenderer",
        dict.fromkeys(("low", "medium", "high"), "<|start|>assistant<|channel|>analysis<|message|>"),
    ),
}
SAID: dict[tuple[str, str], str] = {
    ("qwen3.8", "low"): "Reasoning effort is set to low.",
    ("qwen3.8", "xhigh"): "Reasoning effort is set to xhigh.",
    ("glm-5.3", "low"): "Reasoning Effort: Low",
    ("glm-5.3", "max"): "Reasoning Effort: Max",
    ("inkling", "off"): "Thinking effort level: 0<",
    ("inkling", "low"): "Thinking effort level: 0.2<",
    ("gpt-oss", "low"): "Reasoning: low",
    ("gpt-oss", "high"): "Reasoning: high",
}
"""Other thinking hints in the prompt."""

RENDERED = [model for model in known_models() if model.format.renderer]
REFUSED = [model for model in known_models() if not model.format.renderer]
ONE_EACH = list({model.format.name: model for model in RENDERED}.values())
WAYS = [pytest.param(model, way, id=f"{model.format.name}-{way}") for model in ONE_EACH for way in model.format.choices]


@pytest.fixture(autouse=True)
def harmony(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provides the vocabulary of gpt-oss if installed, which its encoder would download."""
    model = getattr(request.node, "callspec", None) and request.node.callspec.params.get("model")
    if model is not None and model.format.name == "gpt-oss":
        write_harmony_vocabulary(tmp_path)
        monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))


class HarmonyTokenizer:
    """Tokenizer of gpt-oss."""

    name_or_path = "openai/gpt-oss-20b"
    unk_token_id = None
    eos_token_id = 200002
    all_special_ids = all_special_tokens = ()

    def __init__(self) -> None:
        from openai_harmony import load_harmony_encoding

        self._encoding = load_harmony_encoding("HarmonyGptOss")
        self.added_tokens_decoder: dict[int, Any] = {}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.encode(token)[0]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def decode(self, tokens: list[int], **options: Any) -> str:
        return self._encoding.decode(list(tokens))

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def tokenizer_for(format_name: str) -> Any:
    return HarmonyTokenizer() if format_name == "gpt-oss" else stand_in()


@pytest.mark.parametrize("model", RENDERED, ids=lambda model: model.name)
def test_every_model_is_rendered_in_its_own_format(model: Any) -> None:
    chat, tokenizer = model.format, tokenizer_for(model.format.name)
    kind, tails = LANDMARKS[chat.name]
    assert set(tails) == set(chat.thinking)
    for name in (model.name, *(model.name + suffix for suffix in model.variants)):
        texts = {}
        for way in (None, *chat.choices):
            dialect = make_dialect("hermes", name, tokenizer, thinking=way)
            own = select_renderer(name, tokenizer, thinking=way)
            assert type(own).__name__ == kind
            texts[way] = tokenizer.decode(dialect.start(QUESTION))
        for way in chat.choices:
            key = {True: "on", False: "off"}[way] if isinstance(way, bool) else way
            assert texts[way].endswith(tails[key]), way
            assert SAID.get((chat.name, key), "") in texts[way]
            assert "Who wrote it?" in texts[way]
            assert '"type": "function"' in texts[way] or "search" in texts[way]
        default = {"off": False, "on": True}.get(chat.default, chat.default)
        assert texts[None] == texts[default], "None is the default"


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.name)
@pytest.mark.parametrize("suffix", ["", ":peft:262144"])
def test_a_format_that_cannot_be_rendered_is_refused_by_name(model: Any, suffix: str) -> None:
    with pytest.raises(ModelError, match=r"has no chat format that can be rendered: .*Choose another model, such as \w+/\S+, or name") as caught:  # fmt: skip
        select_renderer(model.name + suffix, stand_in())
    assert model.name + suffix in str(caught.value)
    # An explicit renderer overrides it.
    assert type(select_renderer(model.name, stand_in(), "qwen3")).__name__ == "Qwen3Renderer"


def test_a_model_that_always_thinks_is_not_taken_for_one_that_can() -> None:
    with pytest.raises(ModelError, match="opens every answer with <think>"):
        select_renderer("Qwen/Qwen3-4B-Thinking-2507", stand_in())


@pytest.mark.parametrize("model", ONE_EACH, ids=lambda model: model.format.name)
def test_what_a_format_does_not_have_is_refused_with_what_it_has(model: Any) -> None:
    for way in {True, False, "low", "extreme"} - set(model.format.choices):
        with pytest.raises(ModelError, match="does not have thinking=") as caught:
            check_thinking(model.name, None, way)
        assert all(repr(choice) in str(caught.value) for choice in model.format.choices)
    check_thinking(model.name, None, AS_TEMPLATE)


@pytest.mark.parametrize(("model", "way"), WAYS)
def test_turns_follow_one_another_token_for_token(model: Any, way: Any) -> None:
    """Sampled tokens, thoughts included, are never re-rendered: the next prompt extends the last one."""
    tokenizer = tokenizer_for(model.format.name)
    dialect = make_dialect("hermes", model.name, tokenizer, thinking=way)
    prompt = dialect.start(QUESTION)
    for query in ("first", "second"):
        call = dialect.write_call([query])
        assert call, "an empty turn would be trained on"
        assert dialect.read(prompt, call)[1] == SearchRequest((query,))
        appended = dialect.extend(prompt, call, [query], FOUND)
        assert appended
        assert "A novel by Austen." in tokenizer.decode(appended)
        prompt = [*prompt, *call, *appended]
    assert tokenizer.decode(prompt).endswith(tokenizer.decode(dialect.start(QUESTION))[-12:]), (
        "the next turn opens the same way"
    )
    answer = dialect.write_answer("Austen")
    assert dialect.read(prompt, answer)[1] == FinalAnswer("Austen")
    assert answer[-1] in dialect.stop
    cut = dialect.tell(prompt, dialect.write_call(["third"])[:-1], "unfinished")
    assert cut is None or "unfinished" in tokenizer.decode(cut)


THOUGHTS = {
    "qwen3": "<think>\nHm, who?\n</think>\n\n",
    "qwen3.5": "Hm, who?\n</think>\n\n",
    "nemotron-3": "Hm.\n</think>\n",
}


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.8-27B"])
def test_a_thought_is_no_answer_and_stays_where_it_was(name: str) -> None:
    tokenizer, dialect = stand_in(), make_dialect("hermes", name, stand_in(), thinking=True)
    thought = "<think>\nAnswer: wrong\n</think>\n\n" if name.endswith("8B") else "Answer: wrong\n</think>\n\n"
    prompt = dialect.start(QUESTION)
    call = tokenizer.encode(thought, add_special_tokens=False) + dialect.write_call(["x"])
    appended = dialect.extend(prompt, call, ["x"], FOUND)
    assert appended is not None
    final = tokenizer.encode(thought + "Answer: Austen<|im_end|>", add_special_tokens=False)
    assert dialect.read([*prompt, *call, *appended], final) == ("Answer: Austen", FinalAnswer("Austen"))


TEMPLATES = {
    "qwen3": "qwen3", "qwen3-instruct": "qwen3_instruct_2507", "qwen3-vl": "qwen3_vl", "qwen3.5": "qwen3_5_think",
    "qwen3.6": "qwen3_6", "qwen3.8": "qwen3_8", "nemotron-3": "nemotron_3_nano", "nemotron-3-super": "nemotron_3_super",
    "nemotron-3-ultra": "nemotron_3_ultra", "nemotron-3.5": "nemotron_3_5_lightning", "llama-3": "llama3_1",
}  # fmt: skip
CALL = {"type": "function", "id": "c", "function": {"name": "search", "arguments": {"query_list": ["who"]}}}
TOLD = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
CYCLE = [
    *TOLD,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "search", "tool_call_id": "c", "content": "found"},
]
TOOLS = [{"type": "function", "function": SEARCH_TOOL}]


@pytest.mark.parametrize(("model", "way"), [way for way in WAYS if way.values[0].format.name in TEMPLATES])
def test_what_is_rendered_is_what_the_chat_template_writes(model: Any, way: Any) -> None:
    chat, tokenizer = model.format, stand_in()
    template = chat_template(TEMPLATES[chat.name])
    options = chat.thinking[{True: "on", False: "off"}[way] if isinstance(way, bool) else way]
    renderer = select_renderer(model.name, tokenizer, thinking=way)
    for messages, tools in ((TOLD, None), (TOLD, TOOLS), (CYCLE, TOOLS)):
        if chat.name == "qwen3" and way is False and messages is CYCLE:
            continue  # the template drops the turn's empty thought; the renderer keeps sampled tokens
        written = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=True, tokenize=False,
            bos_token="<|begin_of_text|>", **options,
        )  # fmt: skip
        rendered = renderer.render_ids(messages, tools=tools, add_generation_prompt=True)  # type: ignore[arg-type]
        assert tokenizer.decode(rendered) == written


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.6-35B-A3B", "Qwen/Qwen3.8-27B"])
@pytest.mark.parametrize("thinking", [False, True])
def test_qwens_own_vocabulary_gives_the_tokens_of_its_chat_template(name: str, thinking: bool) -> None:
    model = find_model(name)
    assert model is not None
    tokenizer = rebuilt("qwen3" if name.endswith("8B") else "qwen3.5")
    renderer = select_renderer(name, tokenizer, thinking=thinking)
    for tools in (None, TOOLS):
        written = tokenizer.apply_chat_template(
            TOLD, tools=tools, chat_template=chat_template(TEMPLATES[model.format.name]), add_generation_prompt=True,
            tokenize=False, enable_thinking=thinking,
        )  # fmt: skip
        rendered = renderer.render_ids(TOLD, tools=tools, add_generation_prompt=True)  # type: ignore[arg-type]
        assert rendered == tokenizer.encode(written, add_special_tokens=False)
    dialect = make_dialect("hermes", name, tokenizer, thinking=thinking)
    prompt, call = dialect.start(QUESTION), dialect.write_call(["who"])
    assert dialect.read(prompt, call)[1] == SearchRequest(("who",))
    assert dialect.extend(prompt, call, ["who"], FOUND)


def test_plain_chatml_is_for_models_whose_template_writes_it(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer(tmp_path)
    assert type(select_renderer("acme/tuned", tokenizer)).__name__ == "ChatMLRenderer"
    with pytest.raises(ModelError, match="does not have thinking=True"):
        select_renderer("acme/tuned", tokenizer, thinking=True)
    own = tokenizer.chat_template
    tokenizer.chat_template = own.replace("assistant\n", "assistant\n<think>\n")
    with pytest.raises(ModelError, match="its chat template writes something else"):
        select_renderer("acme/tuned", tokenizer)
    assert type(select_renderer("acme/tuned", tokenizer, "chatml")).__name__ == "ChatMLRenderer"
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(ModelError, match="its chat template writes something else"):
        select_renderer("acme/tuned", tokenizer)
    tokenizer.chat_template = None
    assert type(select_renderer("acme/tuned", tokenizer)).__name__ == "ChatMLRenderer"


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_nothink"])
def test_a_tuned_model_of_a_known_family_under_a_name_of_its_own_is_not_taken_for_chatml(template: str) -> None:
    tokenizer = stand_in()
    tokenizer.chat_template = chat_template(template)
    try:
        with pytest.raises(ModelError, match="its chat template writes something else"):
            select_renderer("acme/tuned", tokenizer)
    finally:
        tokenizer.chat_template = None


def test_a_named_renderer_keeps_the_ways_of_thinking_of_the_model() -> None:
    instruct = known_format("Qwen/Qwen3-4B-Instruct-2507", "qwen3-vl")
    assert instruct is find_format("qwen3-instruct")
    assert known_format("acme/tuned", "qwen3") is find_format("qwen3")
    assert known_format("Qwen/Qwen3-0.6B") is find_format("qwen3"), "a model not on Tinker, from the package's map"
    assert known_format("acme/tuned") is None
