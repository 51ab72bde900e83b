"""The prompt of the original recipe, read from the source of the installed ``tinker_cookbook``.

It is parsed rather than imported, which would load Chroma's and Google's clients, pandas and the training loop.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from renderers import ToolSpec

from searchr1_async.episodes.plain_text import PlainText
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import ModelError

_PACKAGE = "tinker_cookbook"
_FOLDER = "recipes/search_tool"
_PROMPT = ("search_env.py", "SEARCH_TASK_INSTRUCTIONS")
_TOOL = ("tools.py", "search", "query_list")


@dataclass(frozen=True, slots=True)
class RecipePrompt:
    """The recipe's prompt and tool."""

    instructions: str
    """System prompt, verbatim."""
    tool: ToolSpec
    """Search tool as declared by the recipe, with its envelope."""


def load_recipe_prompt() -> RecipePrompt:
    """Loads the prompt of the installed recipe.

    Raises:
        ModelError: ``tinker_cookbook`` is not installed, or its version has no such prompt.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # locates the package without running it
    folders = [Path(place) / _FOLDER for place in (spec.submodule_search_locations or ())] if spec else []
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise ModelError(
            'the method "recipe" reads its prompt from the recipe\'s package, which is not installed: '
            "pip install 'searchr1_async[recipe]' (or, since it is only read, pip install --no-deps tinker-cookbook)"
        )
    try:
        return RecipePrompt(_constant(_parsed(folder, _PROMPT[0])), _tool(_parsed(folder, _TOOL[0])))
    except (OSError, SyntaxError, ValueError, LookupError) as error:
        raise ModelError(
            f'the installed tinker_cookbook has no search prompt for the method "recipe" ({error}): '
            "pip install --no-deps tinker-cookbook==0.6.1 has one (it is read, not imported)"
        ) from error


def recipe_results(plain: PlainText, queries: Sequence[str], results: Sequence[Sequence[Passage]]) -> str:
    """Formats results as the recipe does: numbered documents on separate lines, title first."""
    lines: list[str] = []
    for query, passages in zip(queries, results, strict=True):
        lines.append(f"Query: {plain.defuse(query)}")
        for number, passage in enumerate(passages, 1):
            title = [passage.title] if passage.title and passage.title not in passage.text else []
            lines += [f"Document {number}:", *map(plain.defuse, [*title, passage.text])]
    return "".join(f"{line}\n" for line in lines)


def _parsed(folder: Path, name: str) -> ast.Module:
    return ast.parse((folder / name).read_text(encoding="utf-8"), name)


def _constant(module: ast.Module) -> str:
    name = _PROMPT[1]
    for node in module.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = ast.literal_eval(cast(ast.Assign, node).value)
            if isinstance(value, str) and value.strip():
                return value
    raise LookupError(f"no text {name} in {_PROMPT[0]}")


def _tool(module: ast.Module) -> ToolSpec:
    """Tool declaration from the docstring and argument annotation, as pydantic builds the recipe's schema."""
    _, name, argument = _TOOL
    for node in ast.walk(module):
        if not isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef) or node.name != name:
            continue
        notes = {arg.arg: arg.annotation for arg in node.args.args}
        annotation, description = notes.get(argument), ast.get_docstring(node, clean=False)
        if description and isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
            about = ast.literal_eval(annotation.slice.elts[-1])
            if isinstance(about, str):
                return _declaration(name, description, argument, about)
    raise LookupError(f"no tool {name}({argument}) in {_TOOL[0]}")


def _declaration(name: str, description: str, argument: str, about: str) -> ToolSpec:
    title = argument.replace("_", " ").title()
    values = {"description": about, "items": {"type": "string"}, "title": title, "type": "array"}
    schema = {"properties": {argument: values}, "required": [argument], "title": f"{name}_params", "type": "object"}
    tool = {"name": name, "description": description, "parameters": schema}
    # Renderers accept both forms, but some print the tool verbatim, and the recipe includes the envelope.
    return cast(ToolSpec, {"type": "function", "function": tool})
