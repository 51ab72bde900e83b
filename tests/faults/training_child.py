"""A process that trains in the small world and says what it has done: the one that tests kill."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

import searchr1_async as sr
from searchr1_async.events import EpisodeFinished, Event, Notice, StepFinished
from tests import tiny_world


def main(folder: Path, model: str, steps: int) -> None:
    def tell(event: Event) -> None:
        # Written at once and whole, as the process may be gone a moment later.
        if isinstance(event, StepFinished):
            sys.stdout.write(f"step {event.step}\n")
        elif isinstance(event, EpisodeFinished):
            sys.stdout.write(f"episode {event.step}\n")
        elif isinstance(event, Notice) and "(pid " in event.text:
            sys.stdout.write(f"service {event.text.partition('(pid ')[2].rstrip(')')}\n")
        sys.stdout.flush()

    async def train() -> None:
        result = await sr.train(
            tiny_world.make_questions()[0],
            tiny_world.make_search(folder / "index"),
            out_dir=folder / "run",
            model=model,
            resume=True,
            steps=steps,
            emit=tell,
            **(tiny_world.SETTINGS | {"group_size": 2, "groups_per_batch": 3, "minibatches": 3, "checkpoint_every": 4}),
        )
        sys.stdout.write(f"finished {result.steps}\n")

    anyio.run(train)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
