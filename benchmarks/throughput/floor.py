"""The best possible time of a run on the scripted service, from what that service drew; and what a run did, from its log.

An episode is *released* after the sum of its turns' drawn seconds and of its searches at their best: the embedding service's
latency for a query that no other episode asks, nothing for one that may have been found before. A group is released with the
last of its members, each sampled by a request of its own. It can be trained on from then, all of it at once; the trainer does
one thing at a time. Groups whose members all earned the same need no training. So:

- on-policy, streaming: each batch takes ``m + optimizer + save``, where ``m`` is the end of the schedule that trains on the groups
  in the order of their release, which no schedule of one machine beats.
- on-policy, synchronous: ``longest release + training of all + optimizer + save``.
- with weights up to ``k`` batches old: the later of two. The trainer's: the first release, the training of all batches, and their
  optimizer steps and saves. The sampler's: the groups of batch ``b`` (from 1) start at the end of batch ``b - 1 - k`` and must be
  in batch ``b``, so that it ends no earlier than the longest of them, that group's training, optimizer and save after this
  start. The first ``k + 1`` batches start together, and their groups may be in any of them: an earlier one ends when as many
  groups are released as all batches up to it hold.

Everything else (the network, the client, waiting for company) is 0.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.shared.scripted_episodes import GROUP_SIZE, EpisodeSeen, World, episodes_seen
from searchr1_async.local.process import Served, TrainingTimes


@dataclass(frozen=True)
class GroupCourse:
    """What a group takes at best."""

    release: float
    """Seconds from the start of its episodes to the end of the last."""
    training: float
    """Seconds of the trainer; 0 where all members earned the same."""


def courses(
    world: World,
    batches: Sequence[Sequence[int]],
    tokens: Mapping[tuple[int, int], int],
    *,
    per_token: float,
    search_seconds: float,
    first_turn_shared: bool = False,
) -> list[list[GroupCourse]]:
    """Every batch's groups at their best.

    Args:
        world: where the episodes' courses are.
        batches: the questions' numbers.
        tokens: of each episode's training example, by question and member.
        per_token: seconds of training.
        search_seconds: of a search for something new.
        first_turn_shared: all first turns of a group end with their slowest, as one request for all of them does.
    """
    asked = Counter(
        turn.query
        for subject in itertools.chain.from_iterable(batches)
        for member in range(GROUP_SIZE)
        for turn in world.plan(subject, member).turns
        if turn.query is not None
    )

    def course(subject: int) -> GroupCourse:
        plans = [world.plan(subject, member) for member in range(GROUP_SIZE)]
        first = max(plan.turns[0].seconds for plan in plans)
        release = 0.0
        for plan in plans:
            seconds = sum(turn.seconds for turn in plan.turns)
            seconds += search_seconds * sum(turn.query is not None and asked[turn.query] == 1 for turn in plan.turns)
            release = max(release, seconds + (first - plan.turns[0].seconds if first_turn_shared else 0.0))
        is_constant = len({plan.is_right for plan in plans}) == 1
        trained = 0 if is_constant else sum(tokens.get((subject, member), 0) for member in range(GROUP_SIZE))
        return GroupCourse(release, per_token * trained)

    return [[course(subject) for subject in batch] for batch in batches]


def streaming_floor(batches: Sequence[Sequence[GroupCourse]], times: TrainingTimes) -> list[float]:
    """Seconds of each batch at best, on-policy."""
    floors = []
    for batch in batches:
        free = 0.0
        for group in sorted(batch, key=lambda group: group.release):
            free = max(free, group.release) + group.training
        floors.append(free + times.optim_step + times.save)
    return floors


def synchronous_floor(batches: Sequence[Sequence[GroupCourse]], times: TrainingTimes) -> list[float]:
    """Seconds of each batch at best where training begins when all is played."""
    return [
        max(group.release for group in batch) + sum(group.training for group in batch) + times.optim_step + times.save
        for batch in batches
    ]


def pipelined_floor(batches: Sequence[Sequence[GroupCourse]], times: TrainingTimes, staleness: int) -> float:
    """Seconds of the whole run at best where weights may be ``staleness`` batches old."""
    behind = times.optim_step + times.save
    groups = list(itertools.chain.from_iterable(batches))
    trainer = min(group.release for group in groups) + sum(group.training for group in groups) + len(batches) * behind
    together = min(staleness, len(batches) - 1)
    first = sorted(itertools.chain.from_iterable(batches[: together + 1]), key=lambda group: group.release)
    ends: list[float] = []
    for number, batch in enumerate(batches):
        if number < together:
            ready = first[sum(map(len, batches[: number + 1])) - 1].release
        else:
            start = ends[number - 1 - staleness] if number > staleness else 0.0
            ready = start + max(group.release + group.training for group in (batch if number > together else first))
        ends.append(max(ready, ends[-1] if ends else 0.0) + behind)
    return max(trainer, ends[-1])


@dataclass(frozen=True)
class RunSeen:
    """A run as the service saw it; times are :func:`time.monotonic` seconds."""

    began: float
    """The first sample's."""
    step_ends: tuple[float, ...]
    """When the weights behind each optimizer step could be sampled from."""
    in_flight: int
    """The most episodes at a time, from the first turn's beginning to the last one's end."""
    sample_requests: int
    samples: int
    forward_backwards: int
    optimizer_steps: int
    saves: int
    examples: int
    training_tokens: int

    @property
    def ended(self) -> float:
        return self.step_ends[-1]

    @property
    def walls(self) -> list[float]:
        """Seconds of each step."""
        return [end - begin for begin, end in itertools.pairwise((self.began, *self.step_ends))]


def most_in_flight(episodes: Iterable[EpisodeSeen]) -> int:
    """Episodes that were played at a time, at most."""
    changes = sorted(change for seen in episodes for change in ((seen.began, 1), (seen.ended, -1)))
    return max(itertools.accumulate(change for _, change in changes))


def run_seen(served: Sequence[Served], steps: int) -> RunSeen:
    """What the log tells of a run of so many steps; what came behind the last one's weights is left out.

    A step ends when its weights can be sampled from. A last step whose weights are only saved as a checkpoint (the
    cookbook's asynchronous way, which samples no more) ends with the first such checkpoint.

    Raises:
        ValueError: the log holds fewer steps.
    """
    saved: dict[str, dict[int, float]] = {"snapshot": {}, "export": {}}
    for request in served:
        if request.kind in saved:
            saved[request.kind].setdefault(request.version, request.ended)
    published = {step: end for step, end in saved["export"].items() if step == steps} | saved["snapshot"]
    missing = [step for step in range(1, steps + 1) if step not in published]
    if missing:
        raise ValueError(f"no weights were saved for sampling behind steps {missing}: the run ended early")
    ends = tuple(published[step] for step in range(1, steps + 1))
    within = [request for request in served if request.began < ends[-1]]
    samples = [request for request in within if request.kind == "sample"]
    trained = [request for request in within if request.kind == "forward_backward"]
    kinds = Counter(request.kind for request in within)
    return RunSeen(
        began=min(request.began for request in samples),
        step_ends=ends,
        in_flight=most_in_flight(episodes_seen(samples).values()),
        sample_requests=len(samples),
        samples=sum(len(request.sequences) for request in samples),
        forward_backwards=len(trained),
        optimizer_steps=kinds["optim_step"],
        saves=kinds["snapshot"] + kinds["export"],
        examples=sum(request.examples for request in trained),
        training_tokens=sum(request.tokens for request in trained),
    )
