"""The code blocks of a page, each with the line where it stands, and the commands in its prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")
_NEEDS = re.compile(r"<!-- run with: (.+) -->")
_ITEM = re.compile(r"\s*([-*+]|\d+\.)\s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of code."""

    page: str
    line: int
    """Number of its first line of code, from 1."""
    label: str
    """What stands behind its fence; "indented" for one without a fence."""
    needs: str | None
    """What the marker above it says that its example is run with."""
    code: str


def pages() -> dict[str, str]:
    """Return every page whose blocks are checked: name from the root -> text."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("docs", "recipes", "examples"):
        found += sorted((ROOT / folder).rglob("*.md"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in found}


def blocks_of(page: str, text: str) -> list[Block]:
    """Return the blocks of a page, in their order."""
    lines, found, at = text.splitlines(), [], 0
    in_list = False
    while at < len(lines):
        line, above = lines[at], lines[at - 1] if at else ""
        if fence := _FENCE.fullmatch(line):
            end = next(
                (n for n in range(at + 1, len(lines)) if lines[n].strip() == fence[2]), len(lines)
            )
            needs = _NEEDS.fullmatch(above.strip())
            found.append(
                Block(
                    page=page,
                    line=at + 2,
                    label=fence[3].strip(),
                    needs=needs[1] if needs else None,
                    code="".join(f"{code[len(fence[1]) :]}\n" for code in lines[at + 1 : end]),
                )
            )
            at = end + 1
            continue
        if line.startswith("    ") and line.strip() and not above.strip() and not in_list:
            found.append(Block(page=page, line=at + 1, label="indented", needs=None, code=line))
        elif line.strip() and not line.startswith(" "):
            # A paragraph that follows a list item without a blank line still belongs to it.
            in_list = bool(_ITEM.match(line)) or (in_list and bool(above.strip()))
        at += 1
    return found


def spans_of(page: str, text: str) -> Iterator[Block]:
    """Yield the code in a page's prose, each on one line, as blocks labelled "span"."""
    prose, at = text.splitlines(), 0
    for block in blocks_of(page, text):
        at = block.line - 1
        for number in range(at, at + block.code.count("\n")):
            prose[number] = ""
    # Fences are lines of three backticks, which a span never has.
    joined = "\n".join("" if _FENCE.fullmatch(line) else line for line in prose)
    for match in re.finditer(r"`([^`]+)`", joined):
        yield Block(
            page=page,
            line=joined[: match.start()].count("\n") + 1,
            label="span",
            needs=None,
            code=" ".join(match[1].split()),
        )
