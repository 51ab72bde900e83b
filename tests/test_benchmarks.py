"""Every benchmark is listed, documented and has an entry point."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.catalogue import BENCHMARKS, Benchmark

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
ROW = re.compile(
    r"^\| (?P<question>.+?) \| `(?P<name>\w+)[^`]*` \| (?P<minutes>~?\d+) \| (?P<result>.+) \|$", re.MULTILINE
)


def test_the_catalogue_is_the_folders_that_have_a_run() -> None:
    assert sorted(each.name for each in BENCHMARKS) == sorted(path.parent.name for path in FOLDER.glob("*/run.py"))


def test_the_readme_has_one_row_for_each_benchmark() -> None:
    rows = [(row["name"], row["question"], row["minutes"]) for row in ROW.finditer((FOLDER / "README.md").read_text())]
    assert rows == [(each.name, each.question, each.minutes) for each in BENCHMARKS]


def test_links_of_the_readme_lead_somewhere_and_every_result_is_linked() -> None:
    links = set(re.findall(r"\]\(([^)]+)\)", (FOLDER / "README.md").read_text()))
    assert not [link for link in links if not (FOLDER / link).exists()]
    assert {f"results/{path.name}" for path in (FOLDER / "results").glob("*.md")} <= links


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda each: each.name)
def test_an_entry_point_says_what_it_does_and_takes_no_parameter(benchmark: Benchmark) -> None:
    module = ast.parse((FOLDER / benchmark.name / "run.py").read_text())
    mains = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert len(mains) == 1
    assert not mains[0].args.args
    assert f"python -m benchmarks {benchmark.name}" in (ast.get_docstring(module) or "")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_command_lists_the_benchmarks() -> None:
    listed = run()
    assert listed.returncode == 0
    for each in BENCHMARKS:
        assert re.search(
            rf"^ *{each.name} +{each.minutes} min +{re.escape(each.question)}$", listed.stdout, re.MULTILINE
        )


def test_the_command_runs_a_benchmark_by_its_name_with_dashes_too() -> None:
    helped = run("first-turn", "--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith("usage: python -m benchmarks first_turn ")
    assert "--rounds" in helped.stdout


def test_an_unknown_name_is_refused_with_the_list() -> None:
    refused = run("nonsense")
    assert refused.returncode == 1
    assert "there is no benchmark 'nonsense'" in refused.stderr
    assert "first_turn" in refused.stderr
