"""Tables in Markdown."""

from collections.abc import Sequence

from benchmarks.report.tables import Table


def markdown(table: Table) -> str:
    """With its title and its note."""
    return "\n".join([f"### {table.title}\n", *([f"{table.note}\n"] if table.note else []), lines(table)]) + "\n"


def lines(table: Table) -> str:
    return "\n".join([_line(table.headings), "|" + "---|" * len(table.headings), *map(_line, table.rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
