"""Policy for episodes: one version of the weights behind a Tinker sampling client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import tinker
from tinker import types as tinker_types

from searchr1_async.boundary.network import SDK_FAULTS, fault_text
from searchr1_async.boundary.waits import time_limit
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.play import SampledTurn
from searchr1_async.errors import ServiceError


class TinkerPolicy:
    """Samples turns from one version of the weights; with an in-flight client, also from newer ones.

    Args:
        client: sampling client.
        version: optimizer steps before the client's weights.
    """

    def __init__(self, client: tinker.SamplingClient, version: int, settings: SamplingSettings) -> None:
        self.client = client
        self.settings = settings
        self.version = version

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> SampledTurn:
        """Samples one continuation.

        Raises:
            ServiceError: the service failed or did not answer before the deadline.
        """
        (turn,) = await self.sample_many(prompt_tokens, 1, max_tokens=max_tokens, stop=stop, seed=seed)
        return turn

    async def sample_many(
        self,
        prompt_tokens: Sequence[int],
        count: int,
        *,
        max_tokens: int,
        stop: list[int] | list[str],
        seed: int | None,
    ) -> list[SampledTurn]:
        """Samples ``count`` continuations of one prompt in one request, so that the prompt is sent and read once.

        Raises:
            ServiceError: the service failed or did not answer before the deadline.
        """
        began = time.monotonic()
        params = tinker_types.SamplingParams(
            max_tokens=max_tokens, temperature=self.settings.temperature, stop=stop, seed=seed
        )
        # Skips validation and a copy: the tokens are valid and do not change.
        chunk = tinker_types.EncodedTextChunk.model_construct(tokens=prompt_tokens)
        prompt = tinker_types.ModelInput(chunks=[chunk])
        response: tinker_types.SampleResponse | None = None
        try:
            with time_limit(self.settings.deadline):
                response = await self.client.sample(prompt, count, params)
        except SDK_FAULTS as error:
            raise ServiceError(f"the Tinker service failed to sample: {fault_text(error)}") from error
        if response is None:
            raise ServiceError(
                f"the Tinker service returned no sample within {self.settings.deadline:g} s (the sampling deadline)"
            )
        seconds = time.monotonic() - began
        turns: list[SampledTurn] = []
        for sequence in response.sequences:
            if sequence.logprobs is None:
                raise ServiceError(
                    "the Tinker service returned samples without log-probabilities, which training needs"
                )
            turns.append(
                SampledTurn(
                    tokens=tuple(sequence.tokens),
                    logprobs=tuple(sequence.logprobs),
                    truncated=sequence.stop_reason == "length",
                    policy_version=self.version,
                    seconds=seconds,
                    sequence_id=sequence.sequence_id,
                    # The prompt is read once; for the other samples it is billed as fully cached.
                    cached_prompt_tokens=len(prompt_tokens) if turns else response.prompt_cache_hit_tokens,
                )
            )
        if len(turns) != count:
            raise ServiceError(f"the Tinker service returned {len(turns)} samples instead of {count}")
        return turns


@dataclass(slots=True)
class NewestWeights:
    """The run's newest weights, for everything that starts under them."""

    current: TinkerPolicy
    """Replaced when a step's weights are published."""
