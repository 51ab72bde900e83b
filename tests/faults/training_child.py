"""A process that trains in the scripted world and says what it does, a line an event: the one that is killed or interrupted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anyio

import searchr1_async as sr
from searchr1_async.events import (
    EpisodeFinished,
    Event,
    GroupFinished,
    MinibatchSubmitted,
    PhaseStarted,
    RunEnded,
    StepFinished,
)
from tests import tiny_world
from tests.faults import scripted_world


def main(folder: Path, service: str, tokenizer: str, count: int, changes: dict[str, Any]) -> None:
    """Trains on the first ``count`` questions; ``held_out`` and ``warm_up`` among the changes are numbers of questions and steps."""

    def say(*words: object) -> None:
        # At once and whole, as the process may be gone a moment later.
        sys.stdout.write(" ".join(map(str, words)) + "\n")
        sys.stdout.flush()

    def tell(event: Event) -> None:
        match event:
            case PhaseStarted(phase="train"):
                say("begin")
            case PhaseStarted():
                say(event.phase)
            case EpisodeFinished():
                say("episode", event.episode.question.id)
            case GroupFinished():
                say("group", event.group.question.id)
            case MinibatchSubmitted():
                say("minibatch", event.step)
            case StepFinished():
                say("step", event.step)
            case RunEnded():
                say("ended", event.reason)

    held_out, warm_up = changes.pop("held_out", 0), changes.pop("warm_up", 0)

    async def train() -> None:
        questions = scripted_world.questions()
        run = sr.train(
            questions[:count],
            scripted_world.make_search(folder / "index"),
            out_dir=folder / "run",
            service=service,
            resume=True,
            reward=scripted_world.reward,
            on_event=tell,
            held_out=questions[count : count + held_out],
            demonstrations=[sr.Demonstration(one, (one.id.replace("-", " "),)) for one in questions[: 4 * warm_up]],
            **tiny_world.given(
                sr.TrainConfig,
                scripted_world.SETTINGS | changes,
                model="scripted",
                tokenizer=tokenizer,
                warm_up=sr.WarmUp(steps=warm_up, batch_size=2) if warm_up else None,
            ),
        )
        say("running")  # from here on signals are the run's
        say("finished", (await run).steps)

    say("awake")
    anyio.run(train)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]))
