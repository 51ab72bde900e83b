"""A process that warms a model up in the scripted world, and says each step that it has finished: the one that is stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

import searchr1_async as sr
from searchr1_async.events import Event, MinibatchSubmitted, PhaseAdvanced, PhaseStarted
from tests import tiny_world
from tests.faults import scripted_world

STEPS = 6


def say(*words: object) -> None:
    # At once and whole, as the process may be gone a moment later.
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def main(folder: Path, service: str, tokenizer: str) -> None:
    def tell(event: Event) -> None:
        match event:
            case PhaseStarted(phase="evaluate"):
                say("evaluate", event.label)
            case PhaseAdvanced(phase="warm-up"):
                say("warm-up", event.done)
            case MinibatchSubmitted(step=0):
                say("trained")

    async def train() -> None:
        questions = scripted_world.questions()
        await sr.train(
            questions[:30],
            scripted_world.make_search(folder / "index"),
            out_dir=folder / "run",
            service=service,
            resume=True,
            held_out=questions[50:54],
            reward=scripted_world.reward,
            on_event=tell,
            **tiny_world.given(
                sr.TrainConfig,
                scripted_world.SETTINGS,
                model="scripted",
                tokenizer=tokenizer,
                warm_up=sr.WarmUp(steps=STEPS, batch_size=4),
                steps=1,
            ),
        )
        say("finished")

    anyio.run(train)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
