"""A folder or archive of HTML pages with their pictures: a page becomes one document, text and
pictures in reading order.

Dropped: what is not content (navigation, headers and footers of the site, forms, scripts, hidden
elements), icons, pictures that several pages show (logos) or that a page shows again, and pictures
that are not in the folder: remote ones, and whatever leads outside. The parser is Lexbor, which
reads broken pages as browsers do. Read next: kinds.py.
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
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from selectolax.lexbor import LexborHTMLParser, LexborNode

from emu_jax.config import UserError
from emu_jax.data import clean, images
from emu_jax.data.documents import Document, Picture, Skipped, Text
from emu_jax.data.sources import archives
from emu_jax.data.sources.options import SourceOptions
from emu_jax.data.sources.tables import InputShard

PAGES = (".html", ".htm", ".xhtml")
# pages in a unit
FILES = 200
MAX_PAGE = 32 * 2**20
# GIMP's manual: its signs for notes are on 2 to 40 % of the pages, its pictures (but for one) on at
# most 1 %
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
# classes and ids of what is no content
NAMES = re.compile(
    r"(?:site-?|page-?|global-?)?(?:nav(?:bar|header|footer|igation|-.*)?|menu|breadcrumbs?|side-?bar|footer|masthead|cookies?(?:-.*)?|"
    r"ad(?:s|vert.*)?|social(?:-.*)?|share(?:-.*)?|sharing|comments|related(?:-.*)?|newsletter|subscribe|popup|modal|paginat.*|pager|toc|"
    r"skip-?link|copyright)",
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
    r"(?:^|[^a-z])(?:logo|button|icon|favicon|plugin|widget|sprite|spacer|avatar|bullet)s?(?:[^a-z]|$)",
    re.I,
)
CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)""", re.I)


def list_shards(path: Path) -> list[InputShard]:
    """A unit 200 pages. `path` is a folder, a zip, a tar, or one page, whose pictures are then
    sought in its folder.
    """
    if path.is_file() and path.name.lower().endswith(PAGES):
        return [InputShard(path)]
    if not path.exists():
        raise UserError(f"there is no '{path}'")
    names = archives.open_archive(path).names(PAGES)
    if not names:
        raise UserError(f"'{path}' holds no file that ends with {' or '.join(PAGES)}")
    return [
        InputShard(path, tuple(names[first : first + FILES]))
        for first in range(0, len(names), FILES)
    ]


def read_documents(shard: InputShard, options: SourceOptions) -> Iterator[Document | Skipped]:
    """The pages of one unit; ids are their names in the folder or archive."""
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
    """Pictures of three pages of a site or more, which are REPEATED of all its pages, or of two
    where it has two or three. A site is a folder of the root. A pass over all pages, once a
    process.
    """
    shown: Counter[tuple[str, str]] = Counter()
    names = files.names(PAGES)
    for name in names:
        try:
            tree = _parse(files.read(name, MAX_PAGE))
        except ValueError:
            continue
        folder = _folder(tree, name)
        shown.update(
            {
                (_site(name), target)
                for node in tree.css("img")
                if (target := _target(_source(node), folder))
            }
        )
    pages = Counter(map(_site, names))
    return frozenset(
        target
        for (site, target), count in shown.items()
        if (count >= 3 and count >= REPEATED * pages[site]) or (count == 2 and pages[site] < 4)
    )


def _site(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _parse(page: bytes) -> LexborHTMLParser:
    declared = CHARSET.search(page[:4096])
    codings = ["utf-8-sig"] if page[:2] not in (b"\xff\xfe", b"\xfe\xff") else ["utf-16"]
    for coding in [*codings, declared.group(1).decode() if declared else "cp1252", "cp1252"]:
        try:
            text = page.decode(coding)
            break
        except (UnicodeDecodeError, LookupError):
            continue
    else:
        text = page.decode("latin-1")
    try:
        return LexborHTMLParser(text.replace("\0", ""))
    # of selectolax and of the C library below it
    except Exception as error:
        raise ValueError(f"not a readable page: {clean.collapse_whitespace(str(error))}") from error


def _document(
    name: str,
    tree: LexborHTMLParser,
    files: archives.Files,
    repeated: frozenset[str],
    options: SourceOptions,
) -> Document | Skipped:
    parts: list[Text | Picture] = []
    dropped = []
    seen = set()
    text = []
    folder = _folder(tree, name)
    root = (
        tree.css_first("main, [role=main]")
        or (tree.css_first("article") if len(tree.css("article")) == 1 else None)
        or tree.body
    )
    if root is None:
        return Skipped(name, "the page is empty")

    def flush():
        lines = [
            line
            for line in (
                clean.collapse_whitespace(line) if not kept else line.rstrip()
                for line, kept in _lines(text)
            )
            if line.strip()
        ]
        if lines:
            parts.append(Text("\n".join(lines)))
        text.clear()

    for kind, value in _events(root, options.captions):
        if kind != "image":
            text.append((kind, value))
            continue
        picture = _picture(value, folder, files, repeated, seen, options)
        if isinstance(picture, str):
            dropped.append(picture)
            continue
        flush()
        parts.append(picture)
        alt = clean.collapse_whitespace(value.attributes.get("alt") or "")
        if options.alt and alt:
            text += [("break", ""), ("text", alt), ("break", "")]
    flush()
    if not any(isinstance(part, Text) for part in parts):
        return Skipped(name, "no text")
    title = tree.css_first("title")
    return Document(
        name,
        tuple(parts),
        files.root.name,
        {"title": clean.collapse_whitespace(title.text())} if title else {},
        tuple(dropped),
    )


def _events(root: LexborNode, captions: bool) -> Iterator[tuple[str, str | LexborNode]]:
    """("text", str), ("pre", str), ("break", "") and ("image", node), in reading order; no
    recursion, for pages may be nested without end.
    """
    # node (None: a block ends), inside <pre>, inside the article
    stack: list[tuple[LexborNode | None, bool, bool]] = [(root, False, False)]
    while stack:
        node, pre, inner = stack.pop()
        if node is None:
            yield "break", ""
        elif node.tag == "-text":
            yield "pre" if pre else "text", node.text_content or ""
        elif node.tag == "img":
            yield "image", node
        elif node.tag == "br":
            yield "break", ""
        elif node.tag in ("td", "th"):
            yield "text", " "
            stack += [(child, pre, inner) for child in reversed(list(node.iter(include_text=True)))]
        elif (
            not node.tag.startswith("-")
            and (node is root or not _boilerplate(node, inner))
            and (captions or node.tag != "figcaption")
        ):
            inner = (
                inner or node.tag in ("main", "article") or (node is root and node.tag != "body")
            )
            if node.tag in BLOCKS:
                yield "break", ""
                stack.append((None, pre, inner))
            pre = pre or node.tag == "pre"
            stack += [(child, pre, inner) for child in reversed(list(node.iter(include_text=True)))]


def _boilerplate(node: LexborNode, inner: bool) -> bool:
    """Is this element no content? `inner`: it is inside the page's article, where a header is one
    of the article.
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
    """(line, is it of a <pre>) between breaks."""
    line = ""
    kept = False
    for kind, value in [*events, ("break", "")]:
        if kind == "break":
            yield line, kept
            line = ""
            kept = False
        elif kind == "pre":
            *whole, value = (line + value).split("\n")
            yield from ((one, True) for one in whole)
            line = value
            kept = True
        else:
            line += value


def _source(node: LexborNode) -> str:
    """What an <img> shows: src, unless that is a placeholder of a page that loads its pictures
    late.
    """
    attributes = node.attributes
    late = attributes.get("data-src") or attributes.get("data-original") or ""
    source = (attributes.get("src") or "").strip()
    if late and (not source or source.startswith("data:")):
        source = late.strip()
    return source or (attributes.get("srcset") or "").strip().split(" ")[0].rstrip(",")


def _folder(tree: LexborHTMLParser, page: str) -> str | None:
    """Where the relative addresses of a page start: its folder, or what its first <base href> makes
    of that; None for another place.
    """
    base = tree.css_first("base[href]")
    return (
        _joined(base.attributes["href"] or "", posixpath.dirname(page), whole=False)
        if base
        else posixpath.dirname(page)
    )


def _target(source: str, folder: str | None) -> str:
    """The name, in the folder of pages, of what `source` points to from `folder`: "" for what is
    none of its files (remote, data, malformed).

    It may still lead out: reading it is then refused.
    """
    place = _joined(source, folder, whole=True)
    return posixpath.normpath(place.lstrip("/")) if place else ""


def _joined(address: str, folder: str | None, *, whole: bool) -> str | None:
    """`address` as seen from `folder`, `whole` or up to its last "/"; None for one that is not on
    this site, or names nothing.
    """
    try:
        place = urlsplit(address.strip())
    except ValueError:
        return None
    if place.scheme or place.netloc or folder is None or (whole and not place.path):
        return None
    path = posixpath.join(folder, unquote(place.path))
    return path if whole else posixpath.dirname(path)


def _picture(
    node: LexborNode,
    folder: str | None,
    files: archives.Files,
    repeated: frozenset[str],
    seen: set[str],
    options: SourceOptions,
) -> Picture | str:
    """The picture of an <img>, or why it is dropped."""
    source = _source(node)
    if source[:5].lower() == "data:":
        data = _inline(source)
        if data is None:
            return "a picture inside the page that cannot be read"
        key = hashlib.sha256(data).hexdigest()
    else:
        key = _target(source, folder)
        if not key:
            return "a picture that is not in the folder"
        if ICON.search(PurePosixPath(key).stem):
            return "an icon, by its name"
        if key not in files:
            return "a picture whose file is not there"
        if key in repeated:
            return "a picture of several pages"
        try:
            data = files.read(key, images.MAX_BYTES)
        except ValueError:
            return "a picture that cannot be read"
    if key in seen:
        return "a picture that the page shows again"
    seen.add(key)
    sides = images.header_size(data)
    declared = [
        int(value)
        for name in ("width", "height")
        if (value := (node.attributes.get(name) or "").removesuffix("px")).isdecimal()
    ]
    if (sides and _icon(sides, options)) or (len(declared) == 2 and _icon(declared, options)):
        return "an icon, by its size"
    return Picture(data)


def _icon(sides, options: SourceOptions) -> bool:
    return max(sides) < options.icon or 2 * min(sides) < options.icon


def _inline(source: str) -> bytes | None:
    head, _, body = source.partition(",")
    try:
        return (
            base64.b64decode(unquote_to_bytes(body), validate=False)
            if head.lower().endswith(";base64")
            else unquote_to_bytes(body)
        )
    except (binascii.Error, ValueError):
        return None
