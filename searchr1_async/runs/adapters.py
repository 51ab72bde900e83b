"""LoRA adapters merged into their base model, and the model card of exported weights.

Merging takes one weights file at a time: W + alpha / r · B A (Hu et al. 2021, eq. 3). A tied head that the adapter changes is untied:
the head becomes embedding plus update, the embedding is unchanged. (PEFT 0.21 also adds the head's update to the embedding.) It works
on files by name, since transformers loads a mixture's experts fused, whose adapters name each expert's own matrices.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import jinja2

from searchr1_async.episodes.formats import make_dialect
from searchr1_async.episodes.rendering import AS_TEMPLATE
from searchr1_async.episodes.types import Passage, Question
from searchr1_async.errors import ExportError, ModelError
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.folder import load_evaluations, training_questions
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.runs.weights import kept_record
from searchr1_async.service.opening import ADAPTER_CONFIG, ADAPTER_WEIGHTS, lora_parts

if TYPE_CHECKING:
    from torch import Tensor

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEAD = "lm_head.weight"
_HEADS = ("lm_head", "model.unembed_tokens", "unembed_tokens")
"""The output head's path in PEFT and Tinker; in a Hugging Face folder it is :data:`_HEAD`."""
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types that store projections as [in, out]."""
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}
_CARD = Path(__file__).with_name("model_card.md")
_UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


@dataclass(frozen=True, slots=True)
class Adapter:
    updates: Mapping[str, tuple[Tensor, Tensor]]
    """A [rank, in] and B [out, rank] by module path."""
    scale: float
    """alpha / r."""


def read_adapter(folder: Path) -> Adapter:
    """Reads a PEFT folder. Raises ExportError if it is damaged, or an unsupported kind of adapter."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        state = load_file(folder / ADAPTER_WEIGHTS)
        scale = float(config["lora_alpha"]) / int(config["r"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, SafetensorError) as error:
        raise ExportError(f"the adapter in {folder} cannot be read: {type(error).__name__}: {error}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, matrix in state.items():
        path, half = lora_parts(name) or ("", "")
        if path and matrix.ndim == 2:
            halves.setdefault(path, {})[half] = matrix
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if (
        used
        or not halves
        or sum(map(len, halves.values())) != len(state)
        or any(len(pair) < 2 for pair in halves.values())
    ):
        raise ExportError(
            f"the adapter cannot be merged here: it {'uses ' + used[0] if used else 'has no pairs of LoRA matrices of linear layers'}. "
            "Export it with format='peft', or merge it with the model family's own tool"
        )
    return Adapter({path: (pair["A"], pair["B"]) for path, pair in halves.items()}, scale)


def merge(base: Path, adapter: Adapter, folder: Path, *, check: Callable[[], None] = lambda: None) -> None:
    """Writes a Hugging Face folder with merged weights, in the base's precision.

    Holds the adapter and one weights file in memory. Blocking: call it in a thread.

    Args:
        base: a Hugging Face folder with safetensors; its other files are copied.
        check: called before each weight; may raise to cancel.

    Raises ExportError if adapter and base do not match or the base has no safetensors, OSError if the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    is_transposed = config.get("model_type") in _TRANSPOSED
    places: dict[str, str] = {}
    size = 0
    with ExitStack() as stack:
        files = _opened_weights(base, stack)
        targets = _targets(adapter, [name for file in files.values() for name in file.keys()])  # noqa: SIM118
        folder.mkdir(parents=True, exist_ok=True)
        for path, file in files.items():
            tensors: dict[str, Tensor] = {}
            for name in file.keys():  # noqa: SIM118
                check()
                tensors[name] = file.get_tensor(name)
                for module, target in targets.get(name, ()):
                    transposed = is_transposed and target != _HEAD
                    tensors[target] = _updated(file.get_tensor(name), adapter, module, transposed)
            try:
                save_file(tensors, folder / path, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk too
                raise OSError(str(error)) from error
            (folder / path).chmod(0o644)  # safetensors writes 0600; a server may run as another user
            places |= dict.fromkeys(tensors, path)
            size += sum(tensor.nbytes for tensor in tensors.values())
            del tensors
    for other in base.iterdir():
        if other.is_file() and other.suffix not in _NOT_COPIED and not other.name.startswith("."):
            shutil.copyfile(other, folder / other.name)
    if (base / _INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    if any(module in _HEADS for module in adapter.updates):
        for part in (config, config.get("text_config"), config.get("llm_config")):  # a nested default may be "tied"
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _opened_weights(base: Path, stack: ExitStack) -> dict[str, Any]:
    """The base's safetensors by file name."""
    from safetensors import SafetensorError, safe_open

    index = base / _INDEX
    paths = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()} if index.is_file() else {_SINGLE}
    try:
        return {path: stack.enter_context(safe_open(base / path, framework="pt")) for path in sorted(paths)}
    except (FileNotFoundError, SafetensorError) as error:
        raise ExportError(
            f"merging needs the base model in {base.name} as safetensors ({error}): pass another copy with base_model="
        ) from error


def _targets(adapter: Adapter, names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """For each of the base's weights: the adapter's modules that change it, each with the name of the merged weight."""
    known, found = set(names), dict[str, list[tuple[str, str]]]()
    for module in adapter.updates:
        target = source = _HEAD if module in _HEADS else f"{module}.weight"
        embeddings = [name for name in known if name.endswith(_EMBEDDINGS)]
        if source not in known and target == _HEAD and len(embeddings) == 1:  # tied
            source = embeddings[0]
        if source not in known:
            raise ExportError(
                f"the base model has no weight for {module} of the adapter: it is a different model or uses other weight names. "
                "Check base_model=, or export with format='peft'."
            )
        if any(target == other for _, other in found.get(source, ())):
            raise ExportError(f"two modules of the adapter change {target}: export with format='peft'")
        found.setdefault(source, []).append((module, target))
    return found


def _updated(weight: Tensor, adapter: Adapter, module: str, is_transposed: bool) -> Tensor:
    """W + alpha / r · B A, computed in float32 and cast to the weight's dtype; ExportError on a shape mismatch."""
    import torch

    a, b = (matrix.to(torch.float32) for matrix in adapter.updates[module])
    shape = (b.shape[0], a.shape[1])
    if a.shape[0] != b.shape[1] or tuple(weight.shape) != (shape[::-1] if is_transposed else shape):
        raise ExportError(
            f"the adapter's update for {module} has shape {list(shape)}, but the base model's weight is {list(weight.shape)}: it is a "
            "different model"
        )
    change = (b @ a).mul_(adapter.scale)
    return (change.T if is_transposed else change).add(weight.to(torch.float32)).to(weight.dtype).contiguous()


def model_card(facts: Mapping[str, Any], run: Path | None, tokenizer: Any) -> str:
    """The card as Markdown with the hub's YAML header. Contains no path or address of this machine.

    Args:
        facts: ``name``, ``base_model``, ``format`` (peft or merged), ``rank``, ``step`` (None if unknown), ``is_quantized``.
        run: the run's folder, for data, settings and scores. Raises RunFolderError if one of its files cannot be read.
    """
    point = None if run is None else ResumePoint.load(run)
    warm_up = None if point is None else point.settings.get("warm_up")
    stages = [f"a supervised warm-up of {warm_up['steps']} steps on demonstrations"] if warm_up else []
    if facts["step"] is not None:
        stages.append(f"{facts['step']} optimizer steps of reinforcement learning")
    values = {"facts": facts, "stages": stages, "today": date.today().isoformat(), "point": point}
    values["vllm_rank"] = max(8, 1 << (facts["rank"] - 1).bit_length())  # vLLM takes powers of two
    if run is not None and point is not None:
        values |= {
            **_prompt(point, tokenizer),
            "sources": Counter(question.data_source or "unnamed" for question in training_questions(run) or ()),
            "search": kept_record(run),  # an index not built from a corpus stays unnamed: its name may be an address
            "evaluations": load_evaluations(RunRecords(run)),
            # With the loss that was chosen by default.
            "settings": dict(_flat(point.settings)) | ({"learning.loss": point.loss} if point.loss else {}),
        }
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"cell": lambda text: text.replace("|", "\\|").replace("\n", " "), "shown": _shown}
    return environment.from_string(_CARD.read_text(encoding="utf-8")).render(values)


def _prompt(point: ResumePoint, tokenizer: Any) -> dict[str, str]:
    """An example episode with placeholders, in the run's chat and tool-call format."""
    settings = point.settings
    try:
        dialect = make_dialect(
            settings.get("format") or "hermes",
            point.base_model,
            tokenizer,
            renderer_name=settings.get("renderer"),
            thinking=settings.get("thinking", AS_TEMPLATE),
            instructions=settings.get("instructions"),
        )
        prompt, call = dialect.start(Question("", "QUESTION")), dialect.write_call(["QUERY"])
        found = dialect.extend(prompt, call, ["QUERY"], [[Passage("", "TITLE", "PASSAGE")]]) or []
        return {"episode": dialect.decode([*prompt, *call, *found, *dialect.write_answer("ANSWER")])}
    except ModelError as error:  # does not prevent the export
        return {"problem": str(error)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "search":  # a fingerprint
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    """As text; a path is reduced to its last part, to hide the training machine's folders."""
    if not isinstance(value, str):
        return "default" if value in (None, {}) else str(value)
    is_path = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith(("~", "."))
    return PureWindowsPath(value).name if is_path and "\n" not in value else value
