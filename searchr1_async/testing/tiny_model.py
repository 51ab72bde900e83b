"""A tiny language model for tests: random Llama weights and a tokenizer for any text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON_WORDS = """
system user assistant tool search answer information question the of is in and what which who where when
capital country city river mountain highest point population language currency president border
you are a helpful can call to find documents then give short
"""


def make_tiny_tokenizer(
    folder: Path, *, words: Sequence[str] | None = None, byte_level: bool = True
) -> PreTrainedTokenizerFast:
    """Save and return a ChatML tokenizer: ids 0, 1, 2 are <|endoftext|>, <|im_start|>, <|im_end|>.

    With ``byte_level`` every text round-trips and each of ``words`` (alone or after a space) is one token. Otherwise the
    vocabulary is common words, ``words``, white space and punctuation; anything else becomes ``<unk>``.
    """
    vocabulary = list(dict.fromkeys([*_COMMON_WORDS.split(), *(words or ())]))
    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=256 + len(SPECIAL_TOKENS) + 12 * len(vocabulary),
            min_frequency=1,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator([form for word in vocabulary for form in (word, " " + word)], trainer)
    else:
        pieces = dict.fromkeys([*SPECIAL_TOKENS, "<unk>", *" \n.,:;?!<>/\"'{}()[]-_=", *vocabulary])
        tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Split(" ", "isolated"), _split_lines()]
        )
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=IM_END,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML_TEMPLATE
    folder.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(folder)
    return wrapped


def _split_lines() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split("\n", "isolated")


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    words: Sequence[str] | None = None,
    byte_level: bool = True,
    context: int = 2048,
    config_class: Any = None,
    **overrides: Any,
) -> Path:
    """A folder with about 0.4 M random weights, for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    ``overrides`` change the configuration (``hidden_size=64``, ``tie_word_embeddings=False``, …); another
    ``config_class`` (of transformers; None: ``LlamaConfig``) makes a Qwen or a Mistral. Deterministic in its arguments.
    """
    import torch  # slow to import, and not needed for a tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = make_tiny_tokenizer(folder, words=words, byte_level=byte_level)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        # Wider than the usual 0.02, so that the logits of so small a model differ noticeably.
        "initializer_range": 0.08,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            (config_class or LlamaConfig)(**(sizes | overrides)), dtype=torch.float32
        )
    model.save_pretrained(folder)
    return folder
