"""Earlier turns of a conversation: what is searched for, and what the generator is told of them."""

from collections.abc import Sequence

from ..text_clara import check_string

History = Sequence[tuple[str, str]]  # question and answer of each turn, the oldest first
TURNS = 2  # that count


def check_history(history: History) -> tuple[tuple[str, str], ...]:
    """The turns that count; a TypeError names one that is no pair of texts."""
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise TypeError(f"`history` must be a list of (question, answer), got {type(history).__name__}. Pass pairs.")
    for number, turn in enumerate(history):
        if isinstance(turn, str) or not isinstance(turn, Sequence) or len(turn) != 2:
            raise TypeError(f"`history[{number}]` must be (question, answer), got {turn!r}. Pass two texts.")
        for text in turn:
            check_string(text, f"history[{number}]")
    return tuple((question, answer) for question, answer in history[-TURNS:])


def query_of(question: str, history: History) -> str:
    """What is searched for: the earlier questions and the last one."""
    return " ".join([*(earlier for earlier, _ in history), question])


def prompts_of(question: str, history: History) -> list[str]:
    """The question as the generator is asked it, with all turns, with fewer, without any."""
    return [question]
