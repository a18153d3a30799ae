r"""The caption tokenizer of coco-caption: Stanford's PTBTokenizer 3.4.1, without Java.

Tokens are lower-case, without punctuation. The rules give the same tokens as the original's, which
tests/evaluate/metrics/test_ptb.py checks. Rules of the original that differ only in full stops,
which are dropped, are merged here. Read next: automaton.py, captions.py.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from emu_jax.evaluate.metrics.automaton import UNITS, Automaton, char_set

PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

SPACE = r" \t\u00A0\u2000-\u200A\u3000"
# Vowel signs and letters of other scripts that count as letters, although Java says otherwise.
SIGNS = (
    r"\u00AD\u0237-\u024F\u02C2-\u02C5\u02D2-\u02DF\u02E5-\u02FF\u0300-\u036F\u0370-\u037D"
    r"\u0384\u0385\u03CF\u03F6\u03FC-\u03FF\u0483-\u0487\u04CF\u04F6-\u04FF\u0510-\u0525"
    r"\u055A-\u055F\u0591-\u05BD\u05BF\u05C1\u05C2\u05C4\u05C5\u05C7\u0615-\u061A\u063B-\u063F"
    r"\u064B-\u065E\u0670\u06D6-\u06EF\u06FA-\u06FF\u070F\u0711\u0730-\u074F\u0750-\u077F"
    r"\u07A6-\u07B1\u07CA-\u07F5\u07FA\u0900-\u0903\u093C\u093E-\u094E\u0951-\u0955"
    r"\u0962-\u0963\u0981-\u0983\u09BC-\u09C4\u09C7\u09C8\u09CB-\u09CD\u09D7\u09E2\u09E3"
    r"\u0A01-\u0A03\u0A3C\u0A3E-\u0A4F\u0A81-\u0A83\u0ABC-\u0ACF\u0B82\u0BBE-\u0BC2"
    r"\u0BC6-\u0BC8\u0BCA-\u0BCD\u0C01-\u0C03\u0C3E-\u0C56\u0D3E-\u0D44\u0D46-\u0D48"
    r"\u0E30-\u0E3A\u0E47-\u0E4E\u0EB1-\u0EBC\u0EC8-\u0ECD"
)
# Characters that are tokens by themselves: marks, arrows, mathematics, box drawing, dingbats and
# full-width punctuation.
SYMBOLS = (
    r"+%&~^|\\\u00A6\u00A7\u00A8\u00A9\u00AC\u00AE\u00AF\u00B0-\u00BA\u00D7\u00F7\u0387\u05BE"
    r"\u05C0\u05C3\u05C6\u05F3\u05F4\u0600-\u0603\u0606-\u060A\u060C\u0614\u061B\u061E\u066A"
    r"\u066D\u0703-\u070D\u07F6\u07F7\u07F8\u0964\u0965\u0E4F\u1FBD\u2016\u2017\u2020-\u2023"
    r"\u2030-\u2038\u203B\u203E-\u2042\u2044\u207A-\u207F\u208A-\u208E\u2100-\u214F"
    r"\u2190-\u2BFF\u3012\u30FB\uFF01-\uFF0F\uFF1A-\uFF20\uFF3B-\uFF40\uFF5B-\uFF65"
)
# Letters and digits added in Unicode 6.1 to 16, which are unknown to the original (Unicode 6.0).
YOUNG = (
    r"[\u037F-\u0383\u0528-\u0530\u0560\u0588\u05EB-\u05EF\u085F-\u088F\u08A1\u08AD-\u08C9"
    r"\u0978\u0980\u09FC\u0AF2-\u0AF9\u0C34\u0C5A-\u0C5F\u0C80\u0CD7-\u0CDD\u0D04\u0D50-\u0D5F"
    r"\u0DE0-\u0DF1\u0E85-\u0E86\u0E89\u0E8B-\u0E8C\u0E8E-\u0E93\u0E98\u0EA0\u0EA8-\u0EA9"
    r"\u0EAC\u13F5-\u13FF\u16F1-\u16FF\u170D\u1716-\u171F\u1878-\u187F\u191D-\u191F"
    r"\u19AC-\u19C0\u19C8-\u19CF\u1B4C-\u1B4F\u1C80-\u1CBF\u1CF2-\u1CF3\u1CFA-\u1CFF\u2C2F"
    r"\u2C5F\u312E-\u3130\u31BB-\u31BF\u4DB6-\u4DBF\u9FCD-\u9FFF\uA698-\uA69D\uA78F"
    r"\uA794-\uA79F\uA7AB-\uA7F7\uA8FD-\uA8FE\uA9E0-\uA9FF\uAA7E-\uAA7F\uAB2F-\uABBF]"
)
# Words after an acronym that show that the acronym ended a sentence. Letters in brackets match only
# in the given case.
STARTERS = "|".join(
    f"[{word[0]}]{word[1:]}"
    for word in (
        r"About According Additionally After An A As At But Earlier He Her Here However If In It "
        r"Last Many More Mr\. Ms\. Now Once One Other Our She Since So Some Such That Their The "
        r"Then There These They This We When While What Yet You"
    ).split()
)

NAMES = {
    "space": f"[{SPACE}]",
    "blank": r"({space}|\r|\r?\n|[\u2028\u2029\u000B\u000C\u0085])",
    "digit": r"({Nd}|[\u07C0-\u07C9])",
    "letter": rf"({{L}}|&[aeiouAEIOU](acute|grave|uml);|[{SIGNS}])",
    "word": r"{letter}({letter}|{digit})*([.!\?]{letter}({letter}|{digit})*)*",
    "apos": r"(['\u0092\u2019]|&apos;)",
    # Characters used as an apostrophe within a word.
    "quote": r"({apos}|[`\u0091\u2018\u201B])",
    "clitic": "{apos}([msdMSD]|re|ve|ll)",
    "not": "n{quote}t",
    "pause": r"[,;:\u3001]",
    "xml": r"[A-Za-z][A-Za-z0-9_:.\-]*",
    "tag": (
        r"<([!\?][A-Za-z\-][^>\r\n]*|"
        r"{xml}([ ]+({xml}|{xml}[ ]*=[ ]*('[^'\r\n]*'|\"[^\"\r\n]*\")))*[ ]*\/?|\/{xml})[ ]*>"
    ),
    "us": r"((Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(U\.K|U\.S\.S\.R))",
    "initials": r"([A-Za-z](\.[A-Za-z])+|{us})",
    "month": "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec",
    "day": "Mon|Tue|Tues|Wed|Thu|Thurs|Fri",
    "state": (
        "Ala|Ariz|[A]z|[A]rk|Calif|Colo|Conn|Ct|Dak|[D]el|Fla|Ga|[I]ll|Ind|Kans?|Ky|[L]a|[M]ass|"
        "Md|Mich|Minn|[M]iss|Mo|Mont|Neb|Nev|Okla|[O]re|[P]a|Penn|Tenn|[T]ex|Va|Vt|[W]ash|Wisc?|"
        "Wyo"
    ),
    "company": "Inc|Cos?|Corp|Rt|Pp?t[ye]s?|Ltd|Plc|Bancorp|Bhd|Assn|Univ|Intl|Sys",
    "title": (
        "Mr|Mrs|Ms|[M]iss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|"
        "Cpl|Pvt|Mt|Ft|Capt|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Adj|Adv|Asst|"
        "Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc"
    ),
    "short": (
        r"({month}|{day}|{state}|{company}|tel|est|ext|sq|Jr|Sr|Bros|(Ed|Ph)\.D|Blvd|Rd|Esq|etc|"
        r"al|seq|Bldg)\."
    ),
    # Abbreviations that stand before a name.
    "before": (
        r"([A-Za-z]|{initials}|{title}|vs|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Ph|Invt|Elec|Natl|"
        r"M[ft]g|Dept)"
    ),
    "part": r"({L}|{Nd})+",
    # Words such as d'Avignon and O'Neill.
    "joined": r"([dDoOlL]{quote}({L}|{Nd}))?{part}",
    "things": r"{joined}([\-_\u058A\u2010\u2011]{joined})*",
    "model": r"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(-([A-Za-z0-9\u00AD]+|{initials}\.))+",
    "firm": "[A-Z]+(([+&]|&amp;)[A-Z]+)+",
}


class Rule(NamedTuple):
    """A pattern, and the token that a match becomes."""

    pattern: str
    # Matched text -> token; "" drops it.
    make: Callable[[str], str] = str
    # Pattern of the lookahead, which counts towards the longest match but is not consumed.
    ahead: str = ""
    # Number of characters at the end of the match that are not consumed.
    back: int = 0


def soft(text: str) -> str:
    """Remove soft hyphens."""
    return text.replace("\u00ad", "") or "-"


def ampersand(text: str) -> str:
    """Decode `&amp;`."""
    return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def joined(text: str) -> str:
    """Make spaces non-breaking, so that the text stays one token, and name brackets."""
    return text.replace(" ", "\u00a0").replace("(", "-LRB-").replace(")", "-RRB-")


def left(text: str) -> str:
    """Write opening quotation marks as in LaTeX."""
    return _curly(re.sub('"|&quot;', "``", re.sub("&apos;|'", "`", text)))


def right(text: str) -> str:
    """Write closing quotation marks as in LaTeX."""
    return _curly(re.sub('"|&quot;', "''", re.sub("&apos;|'", "'", text)))


def _curly(text: str) -> str:
    for marks, ours in (
        ("\u0091\u2018\u201b\u2039", "`"),
        ("\u0092\u2019\u203a", "'"),
        ("\u0093\u201c\u00ab", "``"),
        ("\u0094\u201d\u00bb", "''"),
    ):
        text = re.sub(f"[{marks}]", ours, text)
    return text


def fraction(text: str) -> str:
    """Spell out a fraction that is a single character."""
    return {
        "\u00bc": "1/4",
        "\u00bd": "1/2",
        "\u00be": "3/4",
        "\u2153": "1/3",
        "\u2154": "2/3",
    }.get(text, text)


def money(text: str) -> str:
    """Write a currency sign in ASCII, as the Penn Treebank does."""
    return {
        "\u00a2": "cents",
        "\u00a3": "#",
        "\u0080": "$",
        "\u00a4": "$",
        "\u20a0": "$",
        "\u20ac": "$",
    }.get(text, text)


def always(token: str) -> Callable[[str], str]:
    """A rule's `make` that ignores the matched text."""
    return lambda text: token


# The order matters: of two rules with equally long matches, the first wins.
RULES = (
    Rule("c[+][+]|(c|f)#"),
    Rule("cannot|'twas", back=3),
    Rule("'tis|gonna|gotta|lemme|gimme|wanna", back=2),
    Rule("{tag}", lambda text: text.replace(" ", "\u00a0")),
    Rule(r"&(MD|mdash|ndash);|[\u0096\u0097\u2013\u2014\u2015]", always("--")),
    Rule("&amp;", always("&")),
    Rule("&(HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"),
    Rule("{word}", soft, ahead="{clitic}"),
    Rule(r"[A-Za-z\u00AD]*[A-MO-Za-mo-z]\u00AD*", soft, ahead="{not}"),
    Rule("{word}", soft),
    Rule(
        r"{apos}n{apos}?|[lLdDjJ]{apos}|Dunkin{apos}|somethin{apos}|ol{apos}|{apos}em|"
        r"[A-HJ-XZn]{quote}{L}{2}{L}*|{apos}[2-9]0s|{apos}till?|"
        r"{L}+[aeiouyAEIOUY]{quote}[aeiouA-Z]{L}*|{apos}cause|cont'd\.?|nor'easter|c'mon|e'er|"
        r"s'mores|ev'ry|li'l|nat'l|O{quote}o"
    ),
    Rule("y{apos}", ahead="{L}"),
    Rule(r"https?:\/\/[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},\-]"),
    Rule(
        r"(www\.([^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|"
        r"([^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+(com|net|org|edu))"
        r"(\/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},\-])?"
    ),
    Rule(
        r"(<|&lt;)?[a-zA-Z0-9][^ \t\n\f\r\"<>|(){}\u00A0]*@"
        r"([^ \t\n\f\r\"<>|(){}.\u00A0]+\.)*[^ \t\n\f\r\"<>|(){}.\u00A0]+(>|&gt;)?"
    ),
    Rule("@[a-zA-Z_][a-zA-Z_0-9]*|#{letter}+"),
    Rule("{clitic}", right, ahead="[^A-Za-z]"),
    Rule("{not}", right, ahead="[^A-Za-z]"),
    Rule(r"{digit}{1,2}[\-\/]{digit}{1,2}[\-\/]{digit}{2,4}"),
    Rule(r"[\-+]?({digit}+|{digit}*([.:,\u00AD\u066B\u066C]{digit}+)+)", soft),
    Rule(r"[\u207A\u207B\u208A\u208B]?([\u2070\u00B9\u00B2\u00B3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    Rule(r"({digit}{1,4}[\- \u00A0])?{digit}{1,4}(\\?\/|\u2044){digit}{1,4}", joined),
    Rule(r"[\u00BC\u00BD\u00BE\u2153-\u215E]", fraction),
    Rule(
        r"-(RRB|LRB|RCB|LCB|RSB|LSB)-|pro-|anti-|S(&|&amp;)P-500|S(&|&amp;)Ls|Cap{apos}n|"
        r"c{apos}est",
        ampersand,
    ),
    Rule(r"[A-Za-z0-9]+(-[A-Za-z]+){0,2}(\\?\/[A-Za-z0-9]+(-[A-Za-z]+){0,2}){1,2}"),
    Rule(r"[A-Z]*\$|#"),
    Rule(r"[\u00A2-\u00A5\u0080\u20A0\u20A4\u20AC\u060B\u0E3F\uFFE0\uFFE1\uFFE5\uFFE6]", money),
    Rule(r"[A-Za-z]\.", lambda text: text[0], ahead=f"{{blank}}+({STARTERS}|{{tag}}){{blank}}"),
    Rule(r"(ca|figs?|prop|nos?|art|bldg|pp|op)\.", ahead="{blank}?{Nd}"),
    Rule(r"(pt[eyEY]|co)\.", ahead="{space}(ltd|lim)"),
    Rule("{short}", ahead="{any}{any}"),
    Rule("{short}"),
    Rule(r"{before}\."),
    Rule("{before}", ahead="{space}"),
    Rule("{initials}|[A-Za-z]", ahead="{blank}"),
    Rule("{apos}[0-9][0-9]", ahead="{blank}"),
    Rule(
        r"({letter}|{digit})+(\.({letter}|{digit})+)*\.(bat|bmp|c|class|cgi|cpp|dll|doc|docx|exe|"
        r"gif|gz|h|htm|html|jar|java|jpeg|jpg|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|x|"
        r"xml|zip)",
        ahead="{blank}|[.?!,]",
    ),
    Rule(r"{word}\.", soft, ahead="{pause}"),
    Rule(
        r"(\([0-9]{2,3}\)[ \u00A0]?|(\+\+?)?([0-9]{2,4}[\- \u00A0])?[0-9]{2,4}[\- \u00A0])"
        r"[0-9]{3,4}[\- \u00A0]?[0-9]{3,5}|"
        r"((\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        joined,
    ),
    Rule('"|&quot;', left, ahead="[A-Za-z0-9$]"),
    Rule('"|&quot;', right),
    Rule("<|&lt;", always("<")),
    Rule(">|&gt;", always(">")),
    # Emoticons such as :-)
    Rule(r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]", joined, ahead="[^A-Za-z0-9]"),
    Rule(
        r"[\-^x=~<>']_[\-^x=~<>']|\([\-^x=~<>'][_.]?[\-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
        joined,
    ),
    Rule(r"\{", always("-LCB-")),
    Rule(r"\}", always("-RCB-")),
    Rule(r"\[", always("-LSB-")),
    Rule(r"\]", always("-RSB-")),
    Rule(r"\(", always("-LRB-")),
    Rule(r"\)", always("-RRB-")),
    Rule("-+", lambda text: "--" if 3 <= len(text) <= 4 else text),
    Rule(r"\.{3,5}|(\.[ \u00A0]){2,4}\.|[\u0085\u2026]", always("...")),
    Rule(
        r"@+|#+|_+|\*+|(\\\*){1,3}|{pause}|[?!]+|[.=\/\u00A1\u00BF\u037E\u0589\u061F\u06D4"
        r"\u0700-\u0702\u07FA\u3002]"
    ),
    Rule(r"{model}\.", soft, ahead="{pause}"),
    Rule("{model}", soft),
    Rule(r"{things}\.", ahead="{pause}"),
    Rule("{things}"),
    Rule(r"{firm}\.", ampersand, ahead="{pause}"),
    Rule("{firm}", ampersand),
    Rule("'", left, ahead=r"[A-Za-z][^ \t\n\r\u00A0]"),
    Rule(
        r"{clitic}|{not}|{apos}|''|[`\u2018-\u201F\u0091-\u0094\u2039\u203A\u00AB\u00BB]{1,2}",
        right,
    ),
    Rule("<<|>>"),
    Rule(f"[{SYMBOLS}]"),
    Rule(r"\u0000|\u007F|{space}+|[\u200B\u200E\u200F\uFEFF]|&nbsp;", always("")),
    Rule(r"\n"),
    Rule("{any}", always("")),
)


def tokenize(captions: Sequence[str]) -> list[str]:
    """Tokenize captions; tokens are separated by spaces.

    "A man's dog!" becomes "a man 's dog". Like coco-caption, this tokenizes all captions as the
    lines of one text, because a few rules look into the next line ("no." is one token before a
    number).
    """
    text = "\n".join(re.sub("[\n\r\u000b\u000c\u2028\u2029]", " ", caption) for caption in captions)
    wide = not text.isascii() and max(text) > "\uffff"
    if wide:
        # Java's characters are UTF-16 code units.
        text = "".join(map(chr, np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")))
    lines: list[list[str]] = [[]]
    for token in _tokens(text):
        if token == "\n":
            lines.append([])
        else:
            lines[-1].append(token.lower())
    return [_drop_punctuation(" ".join(line), wide) for line in lines][: len(captions)]


def _drop_punctuation(line: str, wide: bool) -> str:
    """Drop punctuation tokens. wide: whether the line consists of UTF-16 code units."""
    if wide:
        line = line.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)


def _tokens(text: str) -> Iterator[str]:
    lexer = _lexer()
    classes = lexer.classes(text)
    position = 0
    while position < len(text):
        number, end = lexer.match(classes, position)
        rule = RULES[number]
        if rule.ahead:
            end = _end_before_lookahead(number, text, position, end)
        end -= rule.back
        token = rule.make(text[position:end])
        if token:
            yield token
        position = end


def _end_before_lookahead(number: int, text: str, start: int, stop: int) -> int:
    """The last end of a rule's pattern such that its lookahead matches from there to `stop`."""
    pattern, lookahead = _parts(number)
    pattern_classes = pattern.classes(text[start:stop])
    lookahead_classes = lookahead.classes(text[start:stop])
    length = stop - start
    for end in pattern.ends(pattern_classes, 0, length):
        if lookahead.match(lookahead_classes, end).end == length:
            return start + end
    raise AssertionError(f"rule {number} matches {text[start:stop]!r} only as a whole")


@cache
def _lexer() -> Automaton:
    """The automaton of all rules, each with its lookahead."""
    return Automaton(
        [f"({rule.pattern})({rule.ahead})" if rule.ahead else rule.pattern for rule in RULES],
        _names(),
    )


@cache
def _parts(number: int) -> tuple[Automaton, Automaton]:
    """The automata of a rule's pattern and of its lookahead."""
    return Automaton([RULES[number].pattern], _names()), Automaton([RULES[number].ahead], _names())


@cache
def _names() -> dict:
    """NAMES, and the sets of letters (L), digits (Nd) and all code units (any)."""
    kinds = np.array([unicodedata.category(chr(unit)) for unit in range(UNITS)])
    old = ~char_set(YOUNG)
    letters = np.char.startswith(kinds, "L") & old | char_set(r"[\u1885\u1886]")
    return NAMES | {"any": np.ones(UNITS, bool), "L": letters, "Nd": (kinds == "Nd") & old}
