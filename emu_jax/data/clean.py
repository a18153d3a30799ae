"""Rules that clean captions and detect junk and metadata, in any language.

Read next: sources/pairs.py and sources/videos.py, which use them.
"""

import re
import unicodedata

# The paper strips metadata from WebVid's captions "by rules" that it does not list; these are our
# own. A typical caption: "London, UK - January 12, 2018: crowd on a bridge, aerial. 4k footage,
# 60 fps".
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATE = (
    rf"(?:circa\s+)?(?:{_MONTH}\s*(?:\d{{1,2}}(?:st|nd|rd|th)?\s*,?\s*)?(?:19|20)\d\d"
    rf"|\d{{1,2}}(?:st|nd|rd|th)?\s+{_MONTH}\s*,?\s*(?:19|20)\d\d"
    r"|(?:19|20)\d\d|\d{1,2}[./-]\d{1,2}[./-](?:19|20)?\d\d)"
)
# "City, Country - date: "
_DATELINE = re.compile(rf"^[^:.!?]{{2,80}}?\s*[-–—,]\s*{_DATE}\s*[:.-]\s*", re.I)
_BRACKETS = re.compile(
    r"[\[(](?:[^\[\]()]*\b(?:\d+\s*fps|\d?\dk|u?hd|footage|slow motion|loop(?:able)?|alpha"
    r"|pro\s?res)\b[^\[\]()]*)[\])]",
    re.I,
)
_TECHNICAL = re.compile(
    r"\b(?:(?:ultra|full)\s+hd|u?hd\s+(?=(?:video|footage|clip)s?\b)|u?hd\b(?=\W*$|\W*[.,;])"
    r"|[2468]\s?k\b|\d{3,4}\s?x\s?\d{3,4}\b|(?:720|1080|1440|2160)[pi]\b"
    r"|\d{2,3}(?:[.,]\d+)?\s?fps\b|\d{2,3}\s?frames per second\b"
    r"|pro\s?res(?:\s?\d{3,4}(?:\s?hq)?)?\b|royalty[- ]free\b"
    r"|(?:stock|raw)\s+(?:footage|video|clip)s?\b|(?:no|without)\s+(?:audio|sound)\b"
    r"|alpha\s+(?:channel|matte)\b|red\s+(?:epic|dragon)\b)",
    re.I,
)
# Words that are dropped from the end of a caption.
_LEFT_OVER = frozenset(
    (
        "in",
        "at",
        "with",
        "and",
        "on",
        "shot",
        "footage",
        "video",
        "videos",
        "clip",
        "clips",
        "resolution",
    )
)
_ENDS = " .,;:|/–—-"
# Captions with more characters than this do not have such metadata.
_LONG = 2000

_URL = re.compile(r"^\s*(?:https?://|www\.)\S+\s*$", re.I)
_FILE_NAME = re.compile(
    r"^\s*[\w~()+-]+(?:[ .][\w~()+-]+)*"
    r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|pdf|html?|php|mp4|mov)\s*$",
    re.I,
)
_CAMERA = re.compile(r"^\s*(?:dsc[nf]?|img|pict?|p)[ _-]?\d{4,}\s*$", re.I)


def decode_text(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one.

    All line ends become "\\n". Raises UnicodeError for other bytes.
    """
    coding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(coding)
    except UnicodeDecodeError:
        raise UnicodeError("text is not UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def collapse_whitespace(text: str) -> str:
    """Replace runs of white space and control characters by one space, and strip the ends."""
    return " ".join(
        "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text).split()
    )


def junk_reason(caption: str) -> str:
    """The reason why a caption, in any language, has no content; "" if it has some."""
    # Categories L, letters, and S, symbols, which include emoji.
    if not any(unicodedata.category(letter)[0] in "LS" for letter in caption):
        return "caption has no letters"
    if _URL.match(caption):
        return "caption is a URL"
    if len(caption) < 300 and (_FILE_NAME.match(caption) or _CAMERA.match(caption)):
        return "caption is a file name"
    if len(caption) >= 8 and len(set(caption.lower()) - {" "}) <= 2:
        return "caption repeats itself"
    words = caption.lower().split()
    if len(words) >= 8 and len(set(words)) <= len(words) // 4:
        return "caption repeats itself"
    return ""


def clean_video_caption(text: str) -> str:
    """Remove the leading place and date and all technical terms from a video's caption.

    Returns "" if nothing is left.
    """
    text = collapse_whitespace(text)
    if len(text) > _LONG:
        return text
    text = _DATELINE.sub("", text)
    stripped = _TECHNICAL.sub("", _BRACKETS.sub("", text))
    if stripped != text:
        stripped = re.sub(r"([.,;:])(?:\s*[.,;:])+", r"\1", stripped)
        stripped = re.sub(r"\s+([.,;:])", r"\1", stripped)
        words = collapse_whitespace(stripped).rstrip(_ENDS).split()
        while words and words[-1].strip(_ENDS).lower() in ("", *_LEFT_OVER):
            words.pop()
        stripped = " ".join(words).strip(_ENDS)
        stripped += "." if text.endswith(".") and stripped and stripped[-1] not in "!?" else ""
    return stripped if any(letter.isalpha() for letter in stripped) else ""
