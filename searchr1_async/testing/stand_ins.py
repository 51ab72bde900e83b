"""Stand-ins for tests: a policy, a search and an embedder that do as written, a tiny language model with random weights, and the
embedded service with a function in place of a model, for whole runs in seconds.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from searchr1_async.episodes.types import Passage, Turn
from searchr1_async.errors import SearchError, ServiceError
from searchr1_async.local import LocalService, Scripted, local_service
from searchr1_async.search.embedders import Vectors

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


class ScriptedPolicy:
    """Answers each prompt with the tokens that ``reply`` gives for it."""

    def __init__(self, reply: Callable[[list[int]], Sequence[int]], *, version: int = 0) -> None:
        self.reply = reply
        self.version = version
        self.prompts: list[tuple[int, ...]] = []
        self.requests = 0

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> Turn:
        return (await self.sample_many(prompt_tokens, 1, max_tokens=max_tokens, stop=stop, seed=seed))[0]

    async def sample_many(
        self,
        prompt_tokens: Sequence[int],
        count: int,
        *,
        max_tokens: int,
        stop: list[int] | list[str],
        seed: int | None,
    ) -> list[Turn]:
        await anyio.lowlevel.checkpoint()
        self.requests += 1
        turns = []
        for _ in range(count):
            self.prompts.append(tuple(prompt_tokens))
            tokens = tuple(self.reply(list(prompt_tokens)))
            kept = tokens[:max_tokens]
            turns.append(
                Turn(kept, (-0.5,) * len(kept), truncated=len(tokens) > max_tokens, policy_version=self.version)
            )
        return turns


class BrokenPolicy(ScriptedPolicy):
    """A sampler that fails for good."""

    def __init__(self) -> None:
        super().__init__(lambda prompt: ())

    async def sample_many(self, *args: object, **kwargs: object) -> list[Turn]:
        raise ServiceError("the service is gone")


class DictSearch:
    """Finds one passage per query, made from the query itself, and records the queries."""

    def __init__(self, text: Callable[[str], str] = lambda query: f"All about {query}.") -> None:
        self._text = text
        self.asked: list[tuple[str, ...]] = []

    async def __call__(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        return await self.search(queries)

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        await anyio.lowlevel.checkpoint()
        self.asked.append(tuple(queries))
        return [[Passage(id=query, title="", text=self._text(query))] for query in queries]


class BrokenSearch(DictSearch):
    """A search that fails for good."""

    def __init__(self, *, is_fatal: bool = False) -> None:
        super().__init__()
        self._is_fatal = is_fatal

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        self.asked.append(tuple(queries))
        raise SearchError("the store is gone", is_fatal=self._is_fatal)


class HashingEmbedder:
    """A bag of words, each word at a place (and with a sign) that its hash gives: needs no model and no time.

    A little noise, seeded by the text's hash, breaks ties between texts that share as many words with a query. Chroma orders ties
    differently each time it opens a small folder, because it rebuilds its graph; prompts would then differ between sessions.
    """

    name = "hashed words"
    fingerprint = "hashed-words-apart/512"
    max_texts = 1000
    max_requests = 4
    dimension = 512

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._embed(text) for text in texts])

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return await self.embed_queries(texts)

    def _embed(self, text: str) -> Vectors:
        vector = np.zeros(self.dimension, dtype=np.float32)
        for word in text.split():
            key = zlib.crc32(word.encode())
            vector[key % self.dimension] += 1.0 if key & (1 << 20) else -1.0
        vector /= max(float(np.linalg.norm(vector)), 1e-6)
        noise = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(self.dimension, dtype=np.float32)
        vector += 0.002 * noise
        return vector / float(np.linalg.norm(vector))


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
            [pre_tokenizers.Punctuation("isolated"), *(pre_tokenizers.Split(each, "isolated") for each in " \n")]
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


@asynccontextmanager
async def scripted_service(
    folder: Path,
    reply: str,
    *,
    words: Sequence[str] = (),
    training: Mapping[str, float] | None = None,
    **options: Any,
) -> AsyncIterator[LocalService]:
    """Runs a Tinker service, in a process of its own, whose model is a function; yields its ``url`` and ``api_key``.

    Point a run at it by ``service=running.url`` and the environment variable ``TINKER_API_KEY``. Training moves one number,
    so that versions of the weights differ.

    Args:
        folder: of checkpoints and of the tokenizer.
        reply: ``package.module:function``, importable in that process: from the prompt's tokens and a seeded ``random.Random``
            to new tokens, text, or a :class:`TimedReply`, which also says how long it takes.
        words: each is one token, beside the tokenizer's common words; empty: a tokenizer of bytes, which takes any text.
        training: seconds of training, as fields of :class:`~searchr1_async.local.process.TrainingTimes`.
        options: of :func:`~searchr1_async.local.process.local_service`.

    Raises:
        ServiceError: as :func:`~searchr1_async.local.process.local_service`.
    """
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        await anyio.to_thread.run_sync(lambda: make_tiny_tokenizer(tokenizer, words=words, byte_level=not words))
    scripted = Scripted(reply, training=training or {}, tokenizer_path=str(tokenizer))
    async with local_service("scripted", folder=folder / "service", scripted=scripted, threads=1, **options) as running:
        yield running
