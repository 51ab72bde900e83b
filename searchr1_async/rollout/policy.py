"""The policy: one version of the weights behind a Tinker sampling client, as episodes use it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import tinker
from tinker import types as tinker_types

from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text
from searchr1_async.boundary.waits import time_limit
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.play import SampledTurn
from searchr1_async.errors import ServiceError


class TinkerPolicy:
    """Samples turns from one version of the weights, or, by an in-flight client, from these and newer ones.

    Args:
        client: a sampling client.
        version: steps done before the weights that it was made from.
    """

    def __init__(self, client: tinker.SamplingClient, version: int, settings: SamplingSettings) -> None:
        self.client = client
        self.settings = settings
        self.version = version

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> SampledTurn:
        """One continuation.

        Raises:
            ServiceError: the service refused, failed for good, or was silent past the deadline.
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
        """``count`` continuations of one prompt in one request: its tokens are sent and read only once.

        Raises:
            ServiceError: the service refused, failed for good, or was silent past the deadline.
        """
        began = time.monotonic()
        params = tinker_types.SamplingParams(
            max_tokens=max_tokens, temperature=self.settings.temperature, stop=stop, seed=seed
        )
        # Neither checked nor copied: they are tokens, and stay as they are until the answer is there.
        chunk = tinker_types.EncodedTextChunk.model_construct(tokens=prompt_tokens)
        prompt = tinker_types.ModelInput(chunks=[chunk])
        response: tinker_types.SampleResponse | None = None
        try:
            with time_limit(self.settings.deadline):
                response = await self.client.sample(prompt, count, params)
        except SDK_FAULTS as error:
            raise ServiceError(f"the Tinker service gave no sample: {fault_text(error)}") from error
        if response is None:
            raise ServiceError(
                f"the Tinker service gave no sample within {self.settings.deadline:g} s (the sampling deadline)"
            )
        seconds = time.monotonic() - began
        turns: list[SampledTurn] = []
        for sequence in response.sequences:
            if sequence.logprobs is None:
                raise ServiceError("the Tinker service sampled without log-probabilities, which learning needs")
            turns.append(
                SampledTurn(
                    tokens=tuple(sequence.tokens),
                    logprobs=tuple(sequence.logprobs),
                    truncated=sequence.stop_reason == "length",
                    policy_version=self.version,
                    seconds=seconds,
                    sequence_id=sequence.sequence_id,
                    # The prompt is read once: of the other samples it is billed as cached whole.
                    cached_prompt_tokens=len(prompt_tokens) if turns else response.prompt_cache_hit_tokens,
                )
            )
        if len(turns) != count:
            raise ServiceError(f"the Tinker service gave {len(turns)} samples where {count} were asked for")
        return turns


@dataclass(slots=True)
class NewestWeights:
    """The newest weights of a run, for whatever has to begin under them."""

    current: TinkerPolicy
    """Replaced when a step's weights are published."""
