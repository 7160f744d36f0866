"""What a page of a runbook says: its blocks of code, and what it names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

__all__ = ["blocks", "commands", "heredocs", "inline", "panels", "urls"]

HEREDOC = r"<<'END'\n(.*?)^END$"


def blocks(page: str, language: str) -> list[str]:
    """Give the fenced blocks of a language, those within lists too, without their indentation."""
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", page, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{each[1]}", "", each[2], flags=re.MULTILINE) for each in found]


def heredocs(page: str) -> list[str]:
    """Give the files that the blocks of shell write."""
    return [found[1] for block in blocks(page, "bash") for found in re.finditer(HEREDOC, block, re.S | re.M)]


def commands(page: str, program: str) -> Iterator[list[str]]:
    """Give the commands of the blocks of shell that begin with a program, as words, without what comes after a pipe."""
    for block in blocks(page, "bash"):
        for line in re.sub(HEREDOC, "", block, flags=re.S | re.M).splitlines():
            if line.startswith(f"{program} "):
                words = shlex.split(line.replace("$RUN", "RUN"), comments=True)
                yield words[1 : words.index("|") if "|" in words else None]


def inline(page: str, program: str) -> list[list[str]]:
    """Give the commands that stand within sentences, as words."""
    prose = re.sub(r"^( *)```.*?^\1```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return [text.split() for text in re.findall(rf"`{program} ([^`]+)`", prose)]


def urls(page: str) -> set[str]:
    """Give the paths of the monitor that a page asks for."""
    return {path.replace("$RUN", "RUN") for path in re.findall(r"http://127\.0\.0\.1:9477(/[^\s\"'`]*)", page)}


def panels(page: str) -> list[tuple[str, str]]:
    """Give the dashboard and the title of each panel that a page sends its reader to."""
    lines = re.findall(r"^- Dashboard \*\*Gradiometer / (\w+)\*\*: ((?:.|\n(?!- |\n))*)", page, re.MULTILINE)
    return [(board, " ".join(title.split())) for board, rest in lines for title in re.findall(r"\*([^*]+)\*", rest)]
