"""VQA accuracy as the current vqaEval.py of GT-Vision-Lab/VQA computes it.

Implementations differ. This one normalises predictions and references only if the annotators
disagree. If they all agree, answers are compared as they are, because articles and punctuation
matter in questions about text in an image. LAVIS and older copies always normalise; VizWiz's copy
normalises only predictions.
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
# Spelling with one apostrophe missing -> correct spelling; and one mistake of the original.
CONTRACTIONS = {
    word[:position] + word[position + 1 :]: word
    for word in CONTRACTED
    for position, letter in enumerate(word)
    if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of an answer, 0 to 1.

    It is the mean over annotators of min(1, n / 3), where n of the other annotators gave this
    answer.
    """
    answer = _strip(answer)
    references = [_strip(reference) for reference in references]
    if len(set(references)) > 1:
        answer = normalise(answer)
        references = [normalise(reference) for reference in references]
    agrees = [reference == answer for reference in references]
    return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / len(agrees)


def normalise(answer: str) -> str:
    """Lower-case an answer and remove punctuation and articles.

    Numbers up to ten become digits, and contractions get their apostrophes.
    """
    words = [NUMBERS.get(word, word) for word in _drop_punctuation(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _strip(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _drop_punctuation(text: str) -> str:
    """Replace each punctuation mark by a space.

    A mark is removed instead if it is next to a space anywhere in the text, and all marks are
    removed from a text with a number such as 1,000.
    """
    has_number = re.search(r"\d,\d", text)
    cleaned = text
    for mark in PUNCTUATION:
        remove = has_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if remove else " ")
    # The original passes re.UNICODE, which is 32, as the maximum number of replacements.
    return re.sub(r"\.(?!\d)", "", cleaned, count=32)
