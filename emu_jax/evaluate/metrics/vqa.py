"""VQA accuracy as the current vqaEval.py of GT-Vision-Lab/VQA computes it.

Implementations differ. This one normalises predictions and references, but only if the annotators
disagree: an answer that all agree on is compared as it is, because articles and punctuation count
in questions about text in the image. LAVIS and older copies always normalise; VizWiz's copy
normalises predictions only.
"""

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
CONTRACTED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
""".split()
# Every spelling that lacks one apostrophe, and one slip of the original.
CONTRACTIONS = {
    word[:position] + word[position + 1 :]: word
    for word in CONTRACTED
    for position, letter in enumerate(word)
    if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of an answer, 0 to 1.

    The mean, over each annotator left out, of min(1, other annotators who agree / 3).
    """
    answer = _strip(answer)
    references = [_strip(reference) for reference in references]
    if len(set(references)) > 1:
        answer = normalise(answer)
        references = [normalise(reference) for reference in references]
    agrees = [reference == answer for reference in references]
    return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / len(agrees)


def normalise(answer: str) -> str:
    """Lower-case an answer, without punctuation and articles.

    Numbers up to ten become digits; contractions get their apostrophes.
    """
    words = [NUMBERS.get(word, word) for word in _drop_punctuation(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _strip(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _drop_punctuation(text: str) -> str:
    """Remove each mark, or replace it by a space if it never stands next to one.

    In a text with a number such as 1,000 all marks are removed.
    """
    has_number = re.search(r"\d,\d", text)
    cleaned = text
    for mark in PUNCTUATION:
        remove = has_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if remove else " ")
    # The original passes re.UNICODE, which is 32, as the count.
    return re.sub(r"\.(?!\d)", "", cleaned, count=32)
