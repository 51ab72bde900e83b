"""tinker-cookbook's search recipe as a contender, in an environment of its own that holds neither this project nor its needs.

    python -m benchmarks.throughput.cookbook SETTINGS.json

Driven through its public entry points: ``recipes.search_tool.search_env.SearchR1DatasetBuilder`` and ``rl.train.main``,
configured as ``recipes.search_tool.train`` does, with ``stream_minibatch_config`` or ``async_config`` of ``rl.train.Config``. The
harness has set the environment so that nothing of it needs to be changed: the home folder holds the questions where the recipe
downloads them to, and Google's own variables name the stand-in for Gemini.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.shared.monitor import observing, run_contender


async def play(settings: dict[str, Any]) -> None:
    """One run of one mode."""
    from tinker_cookbook import tokenizer_utils  # pyright: ignore[reportMissingImports]
    from tinker_cookbook.recipes.search_tool.search_env import SearchR1DatasetBuilder  # pyright: ignore[reportMissingImports]
    from tinker_cookbook.recipes.search_tool.tools import RetrievalConfig  # pyright: ignore[reportMissingImports]
    from tinker_cookbook.rl import train  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    tokenizer_utils.register_tokenizer(settings["model"], lambda: tokenizer)
    groups, mode = settings["groups"], settings["mode"]
    builder = SearchR1DatasetBuilder(
        batch_size=groups,
        group_size=settings["group_size"],
        renderer_name=settings["renderer"],
        model_name_for_tokenizer=settings["model"],
        chroma_host="127.0.0.1",
        chroma_port=settings["chroma"],
        chroma_collection_name=settings["collection"],
        retrieval_config=RetrievalConfig(n_results=settings["n_results"]),
        seed=settings["seed"],
    )
    streaming = train.StreamMinibatchConfig(groups_per_batch=groups, num_minibatches=settings["minibatches"])
    loss = {"loss_fn": settings["loss"]} if settings["loss"] else {}
    config = train.Config(
        model_name=settings["model"],
        recipe_name="recipe_search_tool",
        renderer_name=settings["renderer"],
        log_path=settings["out"],
        dataset_builder=builder,
        learning_rate=4e-5,
        max_tokens=1024,
        eval_every=0,
        base_url=settings["url"],
        stream_minibatch_config=streaming if mode == "streaming" else None,
        async_config=(
            train.AsyncConfig(max_steps_off_policy=settings["staleness"], groups_per_batch=groups, **loss)
            if mode == "asynchronous"
            else None
        ),
        max_steps=settings["steps"],
    )
    async with observing(Path(settings["observed"])):
        await train.main(config)


if __name__ == "__main__":
    run_contender(play)
