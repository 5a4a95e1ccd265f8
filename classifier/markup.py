"""Markdown and YAML with texts that may be a stranger's, and so hold anything."""

import json
import re
from typing import Any

from classifier.text import printable


def escape_markdown(text: str) -> str:
    """A text that Markdown shows as it is, in a paragraph as in a cell of a table.

    Character references are never taken for syntax (CommonMark, section 2.5). An underscore within
    a word is no syntax.
    """
    syntax = r"[\\`*\[\]<>#|$~&:@]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(syntax, lambda match: f"&#{ord(match[0])};", text)


def quote_yaml(text: str) -> str:
    """A text as a double-quoted scalar of YAML, which is JSON but for unusual characters."""
    quoted = []
    for character in json.dumps(printable(text), ensure_ascii=False):
        # such as U+2028, which is the end of a line in YAML
        quoted.append(character if character.isprintable() else f"\\U{ord(character):08x}")
    return "".join(quoted)


def yaml_lines(mapping: dict[str, Any], indent: str = "") -> list[str]:
    """A mapping as lines of YAML: values are texts, numbers, mappings, and lists of these."""
    lines = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *yaml_lines(value, indent + "  ")]
        elif isinstance(value, list):
            lines.append(f"{indent}{key}:")
            for item in value:
                lines += _yaml_item(item, indent)
        else:
            lines.append(f"{indent}{key}: {_yaml_scalar(value)}")
    return lines


def _yaml_item(item: Any, indent: str) -> list[str]:
    """An item of a list as lines of YAML."""
    if not isinstance(item, dict):
        return [f"{indent}- {_yaml_scalar(item)}"]
    first, *others = yaml_lines(item, indent + "  ")
    return [f"{indent}- {first.lstrip()}", *others]


def _yaml_scalar(value: str | float) -> str:
    return quote_yaml(value) if isinstance(value, str) else f"{value:.6f}"


def code_block(code: str, language: str = "") -> str:
    """Code between fences that are longer than any within it."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code.strip()}\n{fence}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown; the cells are escaped already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
