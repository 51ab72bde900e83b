"""Tables as Markdown, LaTeX and aligned text. Pure. Labels and names are untrusted and escaped for each format."""

from __future__ import annotations

import re

from searchr1_async.evaluation.render.tables import Cell, Table, one_line

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$^=-])")
_MARKDOWN_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", ":": "&#58;"}
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "…": r"\ldots{}",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "−": "$-$",
    # After the end of a row, LaTeX reads a bracket as an option.
    "[": "{[}",
    "]": "{]}",
}


def markdown_text(text: str, longest: int = 500) -> str:
    """Untrusted text escaped as one line of Markdown.

    Colons, at signs and the dot of www become entities, because GitHub autolinks bare URLs and mentions.
    """
    shown = one_line(text, longest)
    shown = "".join(_MARKDOWN_ENTITIES.get(char, char) if char in "&<>" else char for char in shown)
    shown = _MARKDOWN.sub(r"\\\1", shown)
    shown = re.sub(r"(?<=\w)[:@]|[:@](?=\w|//)", lambda match: _MARKDOWN_ENTITIES[match[0]], shown)
    return re.sub(r"\b(www)\.", r"\1&#46;", shown, flags=re.IGNORECASE)


def markdown_table(table: Table) -> str:
    """A table in GitHub-flavoured Markdown."""
    lines = [
        "| " + " | ".join(map(_markdown_cell, table.headings)) + " |",
        "| " + " | ".join(["---", *["---:"] * (len(table.headings) - 1)]) + " |",
        *("| " + " | ".join(map(_markdown_cell, row)) + " |" for row in table.rows),
    ]
    return "\n".join([*lines, *(["", markdown_text(table.caption)] if table.caption else [])])


def _markdown_cell(cell: Cell) -> str:
    text = markdown_text(cell.text)
    if cell.mark:
        text = f"**{text}**"
    return f"{text} {markdown_text(cell.detail)}".strip()


def latex_text(text: str, longest: int = 500) -> str:
    """Untrusted text escaped as one line of LaTeX."""
    return "".join(_LATEX.get(char, char) for char in one_line(text, longest))


def latex_table(table: Table, *, label: str) -> str:
    """A ``table`` environment that needs ``\\usepackage{booktabs}``; ``label`` is for ``\\ref``."""
    detailed = any(cell.detail for cell in table.headings)
    rows = [_latex_row(table.headings, [latex_text(cell.text) for cell in table.headings])]
    if detailed:
        rows.append(_latex_row(table.headings, [_small(cell.detail) for cell in table.headings]))
    body = [_latex_row(row, [_latex_cell(cell) for cell in row]) for row in table.rows]
    lines = [
        r"\begin{table}[t]",
        r"  \centering",
        f"  \\caption{{{latex_text(table.caption)}}}",
        f"  \\label{{{re.sub(r'[^A-Za-z0-9:-]', '-', label)}}}",
        r"  \small",
        f"  \\begin{{tabular}}{{l{'r' * (len(table.headings) - 1)}}}",
        r"    \toprule",
        *rows,
        r"    \midrule",
        *body,
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: tuple[Cell, ...], texts: list[str]) -> str:
    return "    " + " & ".join(texts) + r" \\"


def _latex_cell(cell: Cell) -> str:
    text = latex_text(cell.text)
    if cell.mark:
        text = f"\\textbf{{{text}}}"
    return f"{text} {_small(cell.detail)}" if cell.detail else text


def _small(text: str) -> str:
    return f"{{\\scriptsize {latex_text(text)}}}" if text else ""


def plain_table(table: Table) -> str:
    """Aligned text; marked cells have a star."""
    lines = [[_plain_cell(cell) for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(text.ljust(width) if place == 0 else text.rjust(width) for place, (text, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]  # fmt: skip
    aligned.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(line.rstrip() for line in [*aligned, *([one_line(table.caption, 1000)] if table.caption else [])])


def _plain_cell(cell: Cell) -> str:
    text = one_line(cell.text) + ("*" if cell.mark else "")
    return f"{text} {one_line(cell.detail)}".rstrip()
