"""Local embeddings: real sentence-transformers models with a few random weights."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchr1_async.errors import EmbeddingError
from searchr1_async.search.embedders import SentenceTransformerEmbedder, _is_e5

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

pytestmark = pytest.mark.anyio

WORDS = "query passage : what is the capital of angola luanda lies on coast".split()  # noqa: SIM905
TEXTS = ["what is the capital of angola", "luanda", "the coast"]


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer without ``modules.json``, in a folder named like an E5 model."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "e5-tiny-v2"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    model = BertModel(
        BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.5, **sizes)
    )
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def mean_of_tokens(folder: Path, texts: list[str]) -> Any:
    """Mean over non-padding tokens, like the Search-R1 paper's retriever."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return ((states * mask).sum(1) / mask.sum(1)).numpy()


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


async def test_a_bare_e5_gets_prompts_and_the_mean_of_its_tokens(bare_folder: Path) -> None:
    embedder = SentenceTransformerEmbedder(bare_folder, device="cpu")
    await embedder.open()
    queries, passages = await embedder.embed_queries(TEXTS), await embedder.embed_passages(TEXTS)
    await embedder.aclose()
    np.testing.assert_allclose(queries, unit(mean_of_tokens(bare_folder, [f"query: {t}" for t in TEXTS])), atol=1e-5)
    np.testing.assert_allclose(passages, unit(mean_of_tokens(bare_folder, [f"passage: {t}" for t in TEXTS])), atol=1e-5)
    assert np.abs(queries - passages).max() > 0.01
    assert queries.dtype == np.float32


async def test_scaling_and_prompts_are_choices(bare_folder: Path) -> None:
    embedder = SentenceTransformerEmbedder(
        bare_folder, device="cpu", query_prompt="", passage_prompt="what ", normalize=False
    )
    await embedder.open()
    queries, passages = await embedder.embed_queries(TEXTS), await embedder.embed_passages(TEXTS)
    await embedder.aclose()
    np.testing.assert_allclose(queries, mean_of_tokens(bare_folder, TEXTS), atol=1e-5)
    np.testing.assert_allclose(passages, mean_of_tokens(bare_folder, [f"what {text}" for text in TEXTS]), atol=1e-5)
    assert embedder.dimension == 32
    assert embedder.max_requests == 1


@pytest.mark.parametrize(
    ("location", "is_e5"),
    [
        ("intfloat/e5-base-v2", True),
        ("intfloat/multilingual-e5-large", True),
        ("E5-small", True),
        ("/models/e5_base", True),
        ("/cache/hub/models--intfloat--e5-base-v2/snapshots/f52bf8ec8c7124536f0efb74aca902b2995e5bcd", True),
        ("intfloat/multilingual-e5-large-instruct", False),
        ("intfloat/e5-mistral-7b-instruct", False),
        ("sentence-transformers/all-MiniLM-L6-v2", False),
        ("/home/e5-user/models/all-MiniLM-L6-v2", False),
        ("me/base5-e50", False),
    ],
)
def test_an_e5_is_told_by_its_name(location: str, is_e5: bool) -> None:
    assert _is_e5(location) is is_e5


def test_indexes_built_before_stay_valid(bare_folder: Path) -> None:
    """The fingerprint names an index folder, so it must not change for old settings."""

    def as_before(location: str, *settings: str) -> str:
        return hashlib.sha256(repr((location, *settings)).encode()).hexdigest()[:32]

    of_hub = as_before("some/model", "float32", "", "")
    assert SentenceTransformerEmbedder("some/model").fingerprint == of_hub
    assert SentenceTransformerEmbedder("some/model", normalize=False).fingerprint != of_hub
    with_prompts = as_before("intfloat/e5-base-v2", "bfloat16", "query: ", "passage: ")
    assert SentenceTransformerEmbedder("intfloat/e5-base-v2", precision="bfloat16").fingerprint == with_prompts
    without = SentenceTransformerEmbedder("intfloat/e5-base-v2", query_prompt="", passage_prompt="").fingerprint
    assert without == as_before("intfloat/e5-base-v2", "float32", "", "")


async def test_a_computation_that_fails_is_an_embedding_error(
    bare_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sentence_transformers import SentenceTransformer

    caplog.set_level(logging.DEBUG)
    embedder = SentenceTransformerEmbedder(bare_folder, device="cpu")
    await embedder.open()
    expected = await embedder.embed_queries(TEXTS)

    def out_of_memory(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(SentenceTransformer, "encode", out_of_memory)
        with pytest.raises(EmbeddingError, match=r"3 texts \(OutOfMemoryError\)") as caught:
            await embedder.embed_queries(TEXTS)
    assert not caught.value.is_fatal
    assert "tried to allocate" in str(caught.value.__cause__)
    assert "angola" not in str(caught.value) + caplog.text
    np.testing.assert_array_equal(await embedder.embed_queries(TEXTS), expected)
    await embedder.aclose()


async def test_a_few_queries_are_embedded_by_one_thread(bare_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a busy service several threads would wait for each other; many texts are worth it."""
    from sentence_transformers import SentenceTransformer

    threads: list[int] = []
    encode = SentenceTransformer.encode

    def observed(self: Any, texts: list[str], **options: Any) -> Any:
        threads.append(torch.get_num_threads())
        return encode(self, texts, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", observed)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    embedder = SentenceTransformerEmbedder(bare_folder, device="cpu")
    try:
        await embedder.open()
        await embedder.embed_queries(TEXTS)
        await embedder.embed_passages(["luanda lies on the coast " * 5_000] * 12)
        await embedder.embed_queries(TEXTS[:1])
    finally:
        await embedder.aclose()
        torch.set_num_threads(before)
    assert threads[1:] == [1, 3, 1]
