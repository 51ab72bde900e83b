"""The offline evaluation of tinker-cookbook's search recipe as a contender, in the environment of benchmarks/throughput/cookbook.py.

    python -m benchmarks.evaluation_throughput.cookbook SETTINGS.json

Its own command, ``recipes.search_tool.offline_eval.cli_main``, source by source. Two of its settings are changed, since it writes
them out instead of asking: where Chroma is (``localhost:8000``), and how many questions were right, which it only prints.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from benchmarks.evaluation_throughput.marks import import_all, marking, prepare_service
from benchmarks.shared.monitor import observing, run_contender


async def play(settings: dict[str, Any]) -> None:
    """One evaluation."""
    from tinker_cookbook import tokenizer_utils  # pyright: ignore[reportMissingImports]
    from tinker_cookbook.recipes.search_tool import offline_eval, tools  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    imports = import_all(settings["tokenizer"])
    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    tokenizer_utils.register_tokenizer(settings["model"], lambda: tokenizer)
    weights = await asyncio.to_thread(prepare_service, settings["url"], settings["model"])
    evaluate_one_dataset = offline_eval.evaluate_one_dataset
    rights: list[int] = []

    class Chroma:
        """The recipe's own tool, at the port of this benchmark's Chroma."""

        @staticmethod
        async def build(**options: Any) -> Any:
            where = {"chroma_host": "127.0.0.1", "chroma_port": settings["chroma"]}
            return await tools.ChromaTool.build(**{**options, **where})

    async def counted(*arguments: Any) -> Any:
        result = await evaluate_one_dataset(*arguments)
        rights.append(round(result["total_correct"]))
        return result

    offline_eval.ChromaTool, offline_eval.evaluate_one_dataset = Chroma, counted
    make_config: Any = offline_eval.CLIConfig
    config = make_config(
        max_eval_samples=settings["questions"],
        base_model=settings["model"],
        renderer_name=settings["renderer"],
        tinker_checkpoint_url=weights,
    )
    async with observing(Path(settings["observed"])):
        with marking(Path(settings["marks"]), imports) as marks:
            await offline_eval.cli_main(config)
            marks.right = sum(rights)


if __name__ == "__main__":
    run_contender(play)
