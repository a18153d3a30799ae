"""VQA accuracy as GT-Vision-Lab/VQA computes it (PythonEvaluationTools/vqaEvaluation/vqaEval.py,
its current state).

Codes in use differ. This one normalises both sides, and only where the annotators disagree: an
answer that all agree on is compared as it is (in questions about text in the picture, articles and
punctuation count). LAVIS and older copies normalise always; VizWiz's own copy normalises
predictions only.
"""

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
CONTRACTED = (
    "'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd "
    "how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've "
    "should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll "
    "what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't "
    "wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
).split()
# From each spelling that lacks one apostrophe; and one slip of the original.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED
    for place, letter in enumerate(word)
    if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"


def accuracy(answer: str, truths: Sequence[str]) -> float:
    """0 to 1: the mean, over each annotator left out, of min(1, agreeing others / 3)."""
    answer = _clean(answer)
    truths = [_clean(truth) for truth in truths]
    if len(set(truths)) > 1:
        answer = normalise(answer)
        truths = [normalise(truth) for truth in truths]
    agree = [truth == answer for truth in truths]
    return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(agree)


def normalise(answer: str) -> str:
    """Lower case, without punctuation and articles; numbers up to ten as digits; contractions with
    their apostrophes.
    """
    words = [NUMBERS.get(word, word) for word in _unpunctuated(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _clean(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _unpunctuated(text: str) -> str:
    """A mark between two letters becomes a space; elsewhere, or where a number has a comma, marks
    go.
    """
    comma = re.search(r"\d,\d", text)
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if comma or f"{mark} " in text or f" {mark}" in text else " ")
    # the original passes re.UNICODE, which is 32, as the count
    return re.sub(r"\.(?!\d)", "", out, count=32)
