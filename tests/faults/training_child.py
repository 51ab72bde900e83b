"""A process that trains in the scripted world and says what it does, a line an event: the one that is killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anyio

import searchr1_async as sr
from searchr1_async.events import EpisodeFinished, Event, GroupFinished, MinibatchSubmitted, PhaseStarted, StepFinished
from tests.faults import scripted_world


def main(folder: Path, service: str, tokenizer: str, count: int, changes: dict[str, Any]) -> None:
    def say(*words: object) -> None:
        # At once and whole, as the process may be gone a moment later.
        sys.stdout.write(" ".join(map(str, words)) + "\n")
        sys.stdout.flush()

    def tell(event: Event) -> None:
        match event:
            case PhaseStarted(phase="train"):
                say("begin")
            case EpisodeFinished():
                say("episode", event.episode.question.id)
            case GroupFinished():
                say("group", event.group.question.id)
            case MinibatchSubmitted():
                say("minibatch", event.step)
            case StepFinished():
                say("step", event.step)

    async def train() -> None:
        result = await sr.train(
            scripted_world.questions()[:count],
            scripted_world.make_search(folder / "index"),
            out_dir=folder / "run",
            service=service,
            model="scripted",
            tokenizer=tokenizer,
            resume=True,
            reward=scripted_world.reward,
            emit=tell,
            **(scripted_world.SETTINGS | changes),
        )
        say("finished", result.steps)

    say("awake")
    anyio.run(train)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]))
