"""Earlier turns of a conversation: the search is told of them, the generator is not.

Measured with clara-smollm2-135m over the passages of the demo: 16 questions that follow another one ("And into which
sea does it flow?") and 4 of another subject than the one before. The best document was the right one for

    16 and 4 if the earlier question stands before the last one in the query,
    16 and 3 if its answer does so too,
     8 and 4 if the last question is searched for alone;

and the answer was right from its memory, and from its text (`expand=1`), for

    7 and 3, 15 and 3 if the generator is asked the last question alone,
    7 and 3, 14 and 2 if the earlier turn stands before it, marked as a turn,
    5 and 2,  8 and 1 if the earlier question and its answer stand before it as a sentence,
    2 and 1,  6 and 1 if the earlier question alone does so: the generator answers that one again.
"""

from collections.abc import Sequence

from ..text_clara import check_string

History = Sequence[tuple[str, str]]  # question and answer of each turn, the oldest first
TURNS, CHARACTERS = (
    2,
    500,
)  # earlier questions that are searched for, and their length: longer ones would drown the last


def check_history(history: History) -> tuple[tuple[str, str], ...]:
    """The turns as they were given; a TypeError names one that is no pair of texts."""
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise TypeError(f"`history` must be a list of (question, answer), got {type(history).__name__}. Pass pairs.")
    for number, turn in enumerate(history):
        if isinstance(turn, str) or not isinstance(turn, Sequence) or len(turn) != 2:
            raise TypeError(f"`history[{number}]` must be (question, answer), got {turn!r}. Pass two texts.")
        for text in turn:
            check_string(text, f"history[{number}]")
    return tuple((question, answer) for question, answer in history)


def query_of(question: str, history: History) -> str:
    """What is searched for: the last earlier questions, as far as they are short, and the question."""
    earlier, n_left = [], CHARACTERS
    for text, _ in reversed(history[-TURNS:]):
        n_left -= len(text)
        if n_left < 0:
            break
        earlier.append(text.strip())
    return " ".join([*reversed(earlier), question])
