"""Prompts of the chat model, character by character, and the clean-up of its answers."""

import pytest

from emu_jax.evaluate import prompts


def test_prompts_are_the_releases():
    system = (
        "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the "
        "image after I provide it to you. Please answer my questions based on the given image."
    )
    ask = (
        "based on the content of the image and common sense, please provide an accurate answer "
        "consisting of only one word or phrase."
    )
    assert (
        prompts.question_prompt("answer", "what is it?")
        == f"{system} [USER]: {{image}} {ask} what is it? [ASSISTANT]: the answer is:"
    )
    assert (
        prompts.question_prompt("known", "what is it?")
        == f"{system} [USER]: {{image}} {ask} what is it?, is the answer known? [ASSISTANT]:"
    )
    assert prompts.question_prompt("caption") == (
        f"{system} [USER]: {{image}}please provide an accurate and concise description of the "
        "given image. [ASSISTANT]: the image depicts a photo of"
    )
    assert prompts.dialog_prompt([("is it red", "yes")], "how many") == (
        f"{system} [USER]: {{image}}</s> [USER]: is it red? [ASSISTANT]: yes.</s> "
        "[USER]: how many? [ASSISTANT]:"
    )
    assert prompts.question_prompt("free", "Why?") == f"{system} [USER]: {{image}}Why? [ASSISTANT]:"
    assert prompts.question_prompt("answer", "who?", video=True).startswith(
        "You are a helpful assistant and you will be presented with a video consisting of"
    )


def test_examples_come_before_the_question():
    shots = [prompts.Shot("red?", "yes", True), prompts.Shot("big?", "no", False)]
    asked = prompts.question_prompt("answer", "new?", shots)

    def turn(image, question):
        return (
            f" [USER]: {image} {prompts.ANSWER_INSTRUCTION} {question} [ASSISTANT]: the answer is:"
        )

    red = f"{turn('{image}', 'red?')} yes.</s>"
    big = f"{turn('', 'big?')} no.</s>"
    assert asked == f"{prompts.IMAGE_SYSTEM}{red}{big}{turn('{image}', 'new?')}"
    assert prompts.question_prompt("answer", "new?", shots, chat=False) == (
        "{image}Question: red? Short answer: yes.\nQuestion: big? Short answer: no.\n"
        "{image}Question: new? Short answer:"
    )
    assert (
        prompts.dialog_prompt([("a", "b")], "c", chat=False)
        == "{image}Question: a? Answer: b.\nQuestion: c? Answer:"
    )


def test_special_tokens_in_questions_are_text():
    assert (
        prompts.question_prompt("free", "[USER] {image} </s> {question} [x]", chat=False)
        == "{image}Question: USER image /s question [x] Answer:"
    )


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (" A dog on a beach. It runs.", "a dog on a beach"),
        (" a Dog\nand more", "a dog"),
        ("", ""),
        (" a dog at 3.5 km.", "a dog at 3.5 km."),
    ],
)
def test_clean_caption(text, clean):
    assert prompts.clean_caption(text) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (" It is a dog. Really", "dog"),
        (" it's the end", "end"),
        (" an apple, red", "apple"),
        (' Stop" says', "stop"),
        (" two\nthree", "two"),
        (" Yes.", "yes"),
        (" theatre", "theatre"),
        (" answer", "answer"),
        (" the", "the"),
        (" 1,000", "1,000"),
        ("", ""),
    ],
)
def test_clean_answer(text, clean):
    assert prompts.clean_answer(text) == clean
