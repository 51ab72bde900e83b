"""Held-out questions that are trained on are refused."""

from __future__ import annotations

import pytest

import searchr1_async as sr
from searchr1_async.training.job import refuse_overlap

pytestmark = pytest.mark.anyio

TRAINING = [
    sr.Question("t0", "Which river flows through the capital of Slovenia?", ("Ljubljanica",), "nq"),
    sr.Question("t1", "What is C++ used for?", ("programs",), "nq"),
    sr.Question("t2", "When did the second emperor of the northern dynasty die?", ("never",), "nq"),
]


def asked(text: str) -> sr.Question:
    return sr.Question("h0", text, ("x",), "popqa")


@pytest.mark.parametrize(
    "text",
    [
        "Which river flows through the capital of Slovenia?",
        "  which RIVER flows, through the Capital of Slovenia",
        "\uff37hich river flows through the capital of Slovenia\uff1f",  # full-width
    ],
)
async def test_the_same_question_is_refused_in_any_spelling(text: str) -> None:
    with pytest.raises(
        sr.errors.ConfigurationError, match=r"1 of 2 held-out questions are also trained on.*'h0'.*'t0'"
    ):
        refuse_overlap(TRAINING, [asked("Who sails there?"), asked(text)])


@pytest.mark.parametrize("text", ["What is C used for?", "Which river flows through the capital of Slovakia?", "???"])
async def test_a_different_question_is_accepted(text: str) -> None:
    refuse_overlap(TRAINING, [asked(text)])
    refuse_overlap(TRAINING, [])
