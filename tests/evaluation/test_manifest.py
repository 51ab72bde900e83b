"""The manifest of a resumed evaluation."""

from __future__ import annotations

from dataclasses import replace

from searchr1_async.evaluation.manifest import Manifest, SystemRecord

THEN = Manifest(
    created="2026-01-01T00:00:00+00:00",
    versions={"python": "3.11.9", "tinker": "1.0"},
    service={},
    search=None,
    settings={},
    suites=(),
    systems=(SystemRecord("a", "search", "m", overlap={"nq": 3}), SystemRecord("b", "search", "m")),
    questions_sha256="0",
)


def test_an_evaluation_that_goes_on_keeps_what_it_was_and_notes_other_versions_once() -> None:
    now = replace(THEN, created="later", versions={"python": "3.11.9", "tinker": "1.1"}, judge={"m": 1})
    found = now.continuing(THEN)
    assert (found.created, found.versions, found.judge) == (THEN.created, THEN.versions, {"m": 1})
    assert found.notes == ("Resumed with other package versions: tinker 1.1 after 1.0.",)
    assert now.continuing(found) == found
    assert replace(THEN, created="later").continuing(THEN) == THEN
