"""House rules that ruff has no rule for: python -m tests.style [FILE ...]; `make lint` runs it.

One binding a statement, no comprehension inside another on one line, comments on their own line,
short first lines of docstrings, and plain words in prose.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("emu_jax", "configs", "benchmarks", "tests")
SUMMARY = 88
# Comments that tools read may stay behind code.
MARKERS = re.compile(r"#\s*(noqa|type:|ty:|pragma|pyright|fmt)")
# Phrases that a reader has to translate, and what to write instead.
PHRASES = {
    r"\bwhence\b": "where ... from",
    r"\banother than\b": "different from",
    r"\b(goes|go|went|going|gone) on\b": "resume or continue",
    r"\bbeside\b": "next to, besides or with",
    r"\b(is|are|was|were) told\b|\btold (of|to|what|by)\b": "get, is given, logs or reports",
    r"\b(is|are) said\b|\bis said of\b": "log, print or report",
    r"\bis no [a-z]+\b|\bare no [a-z]+s\b": "is not a ...",
    r"\bis none of\b": "is not one of",
    r"\bthat which\b|\bthose that lack\b": "name the thing",
    r"\bmade anew\b|\banew\b": "again, or made for each step",
    r"\bwhole or not at all\b": "atomically",
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def offences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, message) for every place where a file breaks a rule."""
    text = path.read_text()
    tree = ast.parse(text)
    yield from bindings(tree)
    yield from comprehensions(tree)
    yield from summaries(tree)
    comments = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    for token in comments:
        code = token.line[: token.start[1]]
        if code.strip() and not MARKERS.match(token.string):
            yield token.start[0], "move the comment to a line of its own above"
    prose = [(token.start[0], token.string) for token in comments]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            prose.append((node.lineno, node.value))
    for line, words in prose:
        for phrase, better in PHRASES.items():
            if found := re.search(phrase, words):
                yield line, f"{found[0]!r} reads as translated: {better}"


def bindings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Statements that bind several values to several names; swaps are allowed."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
            continue
        target = node.targets[0]
        if not isinstance(target, ast.Tuple) or len(target.elts) != len(node.value.elts):
            continue
        names = {ast.unparse(name) for name in target.elts}
        read = {ast.unparse(part) for part in ast.walk(node.value) if isinstance(part, ast.expr)}
        if not names & read:
            yield node.lineno, "bind one name a statement"


def comprehensions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Comprehensions that start on the same line as the comprehension around them."""
    for outer in ast.walk(tree):
        if not isinstance(outer, COMPREHENSIONS):
            continue
        for inner in ast.walk(outer):
            nested = isinstance(inner, COMPREHENSIONS) and inner is not outer
            if nested and inner.lineno == outer.lineno:
                yield inner.lineno, "name the inner comprehension, or write a loop"


def summaries(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """First lines of docstrings that are too long, or start like the end of a sentence."""
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED) or not (doc := ast.get_docstring(node)):
            continue
        first = doc.splitlines()[0]
        line = node.body[0].lineno
        if len(first) > SUMMARY:
            yield line, f"the docstring's first line has {len(first)} columns; {SUMMARY} at most"
        if re.match(r"(Of|As|That of|Those of|With|To|For) [a-z]", first):
            yield line, "start the docstring with an imperative or a noun phrase"


def main(arguments: list[str]) -> int:
    """Print a line for each offence; returns 1 if there is any, else 0."""
    files = [Path(name) for name in arguments]
    if not files:
        files = [path for folder in FOLDERS for path in sorted(Path(folder).rglob("*.py"))]
    count = 0
    for path in files:
        # This file contains the phrases itself.
        if path.name == "style.py":
            continue
        for line, what in sorted(set(offences(path))):
            print(f"{path}:{line}: {what}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
