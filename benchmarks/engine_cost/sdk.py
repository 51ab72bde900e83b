"""The SDK alone as a contender: the same turns of the same lengths, without a search, reading or records.

    python -m benchmarks.engine_cost.sdk SETTINGS.json

A group's first turns are one request, as the engine's are; each further prompt is the last one, what was sampled, and so many
tokens as three passages take.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import tinker
from tinker import types
from transformers import AutoTokenizer

from benchmarks.shared.monitor import observing, run_contender
from benchmarks.shared.scripted_episodes import GROUP_SIZE, INSTRUCTIONS, WORLD_VARIABLE, World

PASSAGES = 420
"""Tokens of three passages of the benchmark's corpus with their queries, about."""


async def play_group(
    client: tinker.SamplingClient, tokenizer: Any, world: World, subject: int, said: list[int]
) -> None:
    """One question's episodes."""
    question = world.subjects[subject].question
    messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": question}]
    text = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)
    prompt: list[int] = tokenizer.encode(f"{text}<|im_start|>assistant\n", add_special_tokens=False)

    async def sample(tokens: list[int], count: int) -> list[list[int]]:
        chunk = types.EncodedTextChunk.model_construct(tokens=tokens)
        params = types.SamplingParams(max_tokens=1024, stop=["<|im_end|>"])
        response = await client.sample(types.ModelInput(chunks=[chunk]), count, params)
        return [list(sequence.tokens) for sequence in response.sequences]

    async def play_episode(member: int, first: list[int]) -> None:
        tokens, sampled = prompt, first
        for _ in world.plan(subject, member).turns[1:]:
            tokens = tokens + sampled + said
            (sampled,) = await sample(tokens, 1)

    firsts = await sample(prompt, GROUP_SIZE)
    await asyncio.gather(*(play_episode(member, first) for member, first in enumerate(firsts)))


async def play(settings: dict[str, Any]) -> None:
    """All groups at once."""
    world = World.read(Path(os.environ[WORLD_VARIABLE]))
    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    words = " ".join(world.words[:PASSAGES])
    inner = tokenizer.encode(words, add_special_tokens=False)[:PASSAGES]
    said = [*tokenizer.encode("<|im_start|>user\n", add_special_tokens=False), *inner]
    said += tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    service = await asyncio.to_thread(tinker.ServiceClient, base_url=settings["url"])
    client = await service.create_sampling_client(base_model=settings["model"])
    async with observing(Path(settings["observed"])):
        await asyncio.gather(*(play_group(client, tokenizer, world, subject, said) for subject in settings["subjects"]))


if __name__ == "__main__":
    run_contender(play)
