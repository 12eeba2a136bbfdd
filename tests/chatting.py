"""A chat of three turns about a picture."""

from __future__ import annotations

from collections.abc import Sequence

from qwencli.config import SamplingOptions
from qwencli.engine.native.engine import NativeEngine
from qwencli.messages import GenerationRequest, text_message, user_message
from tests.checkpoints import picture


def answers_of_turns(engine: NativeEngine, new_tokens: int, *, forget: bool) -> list[Sequence[int]]:
    """The tokens of each answer. forget: nothing is reused from the turns before."""
    greedy = SamplingOptions(do_sample=False, max_new_tokens=new_tokens)
    messages = [user_message("Describe this image.", (picture(),))]
    answers: list[Sequence[int]] = []
    for _ in range(3):
        if forget:
            engine._generation.forget()
        result = engine.generate(GenerationRequest(tuple(messages), greedy))
        answers.append(result.token_ids)
        messages += [text_message("assistant", result.text), user_message("And now?")]
    return answers
