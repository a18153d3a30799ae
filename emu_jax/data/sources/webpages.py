"""HTML pages with their images: each page becomes one document, in reading order.

It drops everything that is not content (navigation, site headers and footers, forms, scripts,
hidden elements), icons, images that several pages show (logos), images that a page repeats, and
images outside the folder, including remote ones. The parser, Lexbor, handles broken pages like a
browser. Read next: kinds.py.
"""

import base64
import binascii
import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from emu_jax.config import UserError
from emu_jax.data import clean, images
from emu_jax.data.documents import Document, Picture, Skipped, Text
from emu_jax.data.sources import archives
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard

if TYPE_CHECKING:
    # Installed by the extra `data`.
    from selectolax.lexbor import LexborHTMLParser, LexborNode

PAGES = (".html", ".htm", ".xhtml")
# Number of pages in a shard.
FILES = 200
# Size limit of a page, in bytes.
MAX_PAGE = 32 * 2**20
# An image on at least this share of a site's pages counts as a logo. In GIMP's manual, the icons
# for notes are on 2 to 40 % of the pages, and all other images but one on at most 1 %.
REPEATED = 0.02

NOT_CONTENT = frozenset(
    (
        "script",
        "style",
        "noscript",
        "template",
        "nav",
        "aside",
        "footer",
        "form",
        "iframe",
        "object",
        "embed",
        "svg",
        "button",
        "select",
        "textarea",
        "input",
        "canvas",
        "audio",
        "video",
        "dialog",
        "menu",
        "head",
        "title",
        "math",
    )
)
ROLES = frozenset(
    (
        "navigation",
        "banner",
        "contentinfo",
        "complementary",
        "search",
        "menu",
        "menubar",
        "dialog",
        "alertdialog",
        "toolbar",
    )
)
# Classes and ids of elements that are not content.
NAMES = re.compile(
    r"(?:site-?|page-?|global-?)?(?:nav(?:bar|header|footer|igation|-.*)?|menu|breadcrumbs?"
    r"|side-?bar|footer|masthead|cookies?(?:-.*)?|ad(?:s|vert.*)?|social(?:-.*)?|share(?:-.*)?"
    r"|sharing|comments|related(?:-.*)?|newsletter|subscribe|popup|modal|paginat.*|pager|toc"
    r"|skip-?link|copyright)",
    re.I,
)
BLOCKS = frozenset(
    (
        "address",
        "article",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "tfoot",
        "thead",
        "tr",
        "ul",
    )
)
ICON = re.compile(
    r"(?:^|[^a-z])(?:logo|button|icon|favicon|plugin|widget|sprite|spacer|avatar|bullet)s?"
    r"(?:[^a-z]|$)",
    re.I,
)
CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)""", re.I)


def list_shards(path: Path) -> list[InputShard]:
    """One shard per FILES pages of a folder, zip or tar.

    `path` may also be a single page, whose images are looked up in its folder.
    """
    if path.is_file() and path.name.lower().endswith(PAGES):
        return [InputShard(path)]
    if not path.exists():
        raise UserError(f"'{path}' does not exist")
    names = archives.open_archive(path).names(PAGES)
    if not names:
        raise UserError(f"'{path}' contains no file ending in {' or '.join(PAGES)}")
    return [
        InputShard(path, tuple(names[first : first + FILES]))
        for first in range(0, len(names), FILES)
    ]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The pages of one shard; ids are their names in the folder or archive."""
    files = archives.open_archive(shard.path if shard.names else shard.path.parent)
    repeated = _repeated(files) if shard.names else frozenset()
    for name in shard.names or (shard.path.name,):
        try:
            tree = _parse(files.read(name, MAX_PAGE))
        except ValueError as error:
            yield Skipped(name, str(error))
        else:
            yield _document(name, tree, files, repeated, options)


@lru_cache(2)
def _repeated(files: archives.Files) -> frozenset[str]:
    """Images that several pages of a site show, such as logos.

    A site is a top-level folder. An image is repeated if it is on at least three of the site's
    pages and on at least the share REPEATED of them; on a site of at most three pages, two are
    enough. This reads all pages, once per process.
    """
    shown: Counter[tuple[str, str]] = Counter()
    names = files.names(PAGES)
    for name in names:
        try:
            tree = _parse(files.read(name, MAX_PAGE))
        except ValueError:
            continue
        folder = _folder(tree, name)
        targets = {_target(_source(node), folder) for node in tree.css("img")} - {""}
        shown.update((_site(name), target) for target in targets)
    pages = Counter(map(_site, names))
    return frozenset(
        target
        for (site, target), count in shown.items()
        if (count >= 3 and count >= REPEATED * pages[site]) or (count == 2 and pages[site] < 4)
    )


def _site(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _parse(page: bytes) -> "LexborHTMLParser":
    from selectolax.lexbor import LexborHTMLParser

    text = _decode(page)
    try:
        return LexborHTMLParser(text.replace("\0", ""))
    # selectolax and the C library below it raise many kinds of errors.
    except Exception as error:
        raise ValueError(f"not a readable page: {clean.collapse_whitespace(str(error))}") from error


def _decode(page: bytes) -> str:
    """Decode by the byte order mark, as UTF-8, by <meta charset>, or else as Windows-1252."""
    declared = CHARSET.search(page[:4096])
    encodings = ["utf-16" if page[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"]
    if declared:
        encodings.append(declared.group(1).decode())
    for encoding in [*encodings, "cp1252"]:
        try:
            return page.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    return page.decode("latin-1")


def _document(
    name: str,
    tree: "LexborHTMLParser",
    files: archives.Files,
    repeated: frozenset[str],
    options: SourceOptions,
) -> Document | Skipped:
    root = _content_root(tree)
    if root is None:
        return Skipped(name, "page is empty")
    parts: list[Text | Picture] = []
    dropped = []
    seen: set[str] = set()
    # Text events since the last image.
    pending: list[tuple[str, str]] = []
    folder = _folder(tree, name)
    for kind, value in _events(root, options.captions):
        if isinstance(value, str):
            pending.append((kind, value))
            continue
        picture = _picture(value, folder, files, repeated, seen, options)
        if isinstance(picture, str):
            dropped.append(picture)
            continue
        parts += _text_parts(pending)
        parts.append(picture)
        pending = []
        alt = clean.collapse_whitespace(value.attributes.get("alt") or "")
        if options.alt and alt:
            pending = [("break", ""), ("text", alt), ("break", "")]
    parts += _text_parts(pending)
    if not any(isinstance(part, Text) for part in parts):
        return Skipped(name, "no text")
    title = tree.css_first("title")
    provenance = {"title": clean.collapse_whitespace(title.text())} if title else {}
    return Document(name, tuple(parts), files.root.name, provenance, tuple(dropped))


def _content_root(tree: "LexborHTMLParser") -> "LexborNode | None":
    """The element with the page's content: <main>, its only <article>, or <body>."""
    main = tree.css_first("main, [role=main]")
    if main:
        return main
    articles = tree.css("article")
    return articles[0] if len(articles) == 1 else tree.body


def _text_parts(events: list[tuple[str, str]]) -> list[Text]:
    """Join the lines of the events into one text; returns [] if all are blank."""
    lines = []
    for line, is_preformatted in _lines(events):
        line = line.rstrip() if is_preformatted else clean.collapse_whitespace(line)
        if line.strip():
            lines.append(line)
    return [Text("\n".join(lines))] if lines else []


def _events(root: "LexborNode", captions: bool) -> "Iterator[tuple[str, str | LexborNode]]":
    """Yield ("text", str), ("pre", str), ("break", "") and ("image", node) in reading order.

    It uses a stack instead of recursion, because pages may be nested without limit.
    """
    # (node, or None for the end of a block; whether inside <pre>; whether inside the article)
    stack: list[tuple[LexborNode | None, bool, bool]] = [(root, False, False)]
    while stack:
        node, pre, inner = stack.pop()
        if node is None:
            yield "break", ""
            continue
        tag = node.tag or ""
        if tag == "-text":
            yield "pre" if pre else "text", node.text_content or ""
        elif tag == "img":
            yield "image", node
        elif tag == "br":
            yield "break", ""
        elif tag in ("td", "th"):
            yield "text", " "
            stack += _children(node, pre, inner)
        elif _is_content(node, tag, root, inner, captions):
            inner = inner or tag in ("main", "article") or (node is root and tag != "body")
            if tag in BLOCKS:
                yield "break", ""
                stack.append((None, pre, inner))
            stack += _children(node, pre or tag == "pre", inner)


def _children(
    node: "LexborNode", pre: bool, inner: bool
) -> "list[tuple[LexborNode | None, bool, bool]]":
    """The children of a node in the order to push them on the stack: the last first."""
    return [(child, pre, inner) for child in reversed(list(node.iter(include_text=True)))]


def _is_content(
    node: "LexborNode", tag: str, root: "LexborNode", inner: bool, captions: bool
) -> bool:
    # Comments, doctypes and the like.
    if tag.startswith("-"):
        return False
    if tag == "figcaption" and not captions:
        return False
    return node is root or not _boilerplate(node, inner)


def _boilerplate(node: "LexborNode", inner: bool) -> bool:
    """Whether an element is not content.

    inner: whether it is inside the article, where a <header> is content.
    """
    if node.tag in NOT_CONTENT or (node.tag == "header" and not inner):
        return True
    if node.tag in ("main", "article", "body", "html"):
        return False
    attributes = node.attributes
    style = (attributes.get("style") or "").replace(" ", "").lower()
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or "display:none" in style
        or (attributes.get("role") or "").lower() in ROLES
        or any(
            NAMES.fullmatch(word)
            for word in f"{attributes.get('class') or ''} {attributes.get('id') or ''}".split()
        )
    )


def _lines(events: list[tuple[str, str]]) -> Iterator[tuple[str, bool]]:
    """Yield (line, is_preformatted), splitting at breaks and at newlines inside <pre>."""
    line = ""
    is_preformatted = False
    for kind, value in [*events, ("break", "")]:
        if kind == "break":
            yield line, is_preformatted
            line = ""
            is_preformatted = False
        elif kind == "pre":
            *complete, line = (line + value).split("\n")
            for one in complete:
                yield one, True
            is_preformatted = True
        else:
            line += value


def _source(node: "LexborNode") -> str:
    """The address of an <img>: its src, or data-src if src is a placeholder for lazy loading."""
    attributes = node.attributes
    late = attributes.get("data-src") or attributes.get("data-original") or ""
    source = (attributes.get("src") or "").strip()
    if late and (not source or source.startswith("data:")):
        source = late.strip()
    return source or (attributes.get("srcset") or "").strip().split(" ")[0].rstrip(",")


def _folder(tree: "LexborHTMLParser", page: str) -> str | None:
    """The folder that a page's relative addresses start from: its own, or its <base href>.

    None if the <base href> is on another site.
    """
    base = tree.css_first("base[href]")
    return (
        _joined(base.attributes["href"] or "", posixpath.dirname(page), is_file=False)
        if base
        else posixpath.dirname(page)
    )


def _target(source: str, folder: str | None) -> str:
    """The file that the address `source` on a page in `folder` points to, or "".

    The name is relative to the folder of pages. It may lead outside that folder, but `Files`
    refuses to read such names. Remote, inline and malformed addresses are not files.
    """
    place = _joined(source, folder, is_file=True)
    return posixpath.normpath(place.lstrip("/")) if place else ""


def _joined(address: str, folder: str | None, *, is_file: bool) -> str | None:
    """Join an address with `folder`; unless `is_file`, return the folder of the joined path.

    Returns None for an address on another site, and for a file's address without a path.
    """
    try:
        place = urlsplit(address.strip())
    except ValueError:
        return None
    if place.scheme or place.netloc or folder is None or (is_file and not place.path):
        return None
    path = posixpath.join(folder, unquote(place.path))
    return path if is_file else posixpath.dirname(path)


def _picture(
    node: "LexborNode",
    folder: str | None,
    files: archives.Files,
    repeated: frozenset[str],
    seen: set[str],
    options: SourceOptions,
) -> Picture | str:
    """The image of an <img>, or the reason why it is dropped."""
    source = _source(node)
    if source[:5].lower() == "data:":
        data = _inline(source)
        if data is None:
            return "inline image cannot be decoded"
        key = hashlib.sha256(data).hexdigest()
    else:
        key = _target(source, folder)
        if not key:
            return "image is not in the folder"
        if ICON.search(PurePosixPath(key).stem):
            return "icon, by its name"
        if key not in files:
            return "image file is missing"
        if key in repeated:
            return "image repeated on several pages"
        try:
            data = files.read(key, images.MAX_BYTES)
        except ValueError:
            return "image file cannot be read"
    if key in seen:
        return "image repeated on the page"
    seen.add(key)
    if _is_icon(images.header_size(data), options) or _is_icon(_declared_size(node), options):
        return "icon, by its size"
    return Picture(data)


def _declared_size(node: "LexborNode") -> tuple[int, int] | None:
    """Width and height in an <img>'s attributes; None unless it has both."""
    sides = [(node.attributes.get(name) or "").removesuffix("px") for name in ("width", "height")]
    if not all(side.isdecimal() for side in sides):
        return None
    width, height = sides
    return int(width), int(height)


def _is_icon(sides: tuple[int, int] | None, options: SourceOptions) -> bool:
    if sides is None:
        return False
    return max(sides) < options.icon or 2 * min(sides) < options.icon


def _inline(source: str) -> bytes | None:
    head, _, body = source.partition(",")
    try:
        data = unquote_to_bytes(body)
        if head.lower().endswith(";base64"):
            return base64.b64decode(data, validate=False)
        return data
    except (binascii.Error, ValueError):
        return None
