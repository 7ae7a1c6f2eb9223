"""Generated English fact sheets: what clara-pico learns from, and what its tests ask.

First in the data's way: it writes records that `data.py` reads like any other data. It knows nothing of tokenizers,
models or training. Everything comes from a seed; the test split has people and wordings that training never shows.

    python -m recipes.models.pico.facts --output data/pico
"""

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from modeling_clara.corpus.storage import write_lines

N_FACTS = 4  # of a sheet, each of another relation
# Each relation with its values, its statements, which have {first}, and its questions, which have {name}. The last
# statement and the last question are the unseen wordings of the test split. Their words all occur in training, in
# other sentences: a model of this size cannot know a word that it has never seen.
TEXTS = """
job
baker teacher pilot farmer lawyer nurse painter sailor carpenter doctor tailor miner chemist butcher gardener
plumber writer barber waiter banker driver judge dancer singer
{first} works as a {value}.
The job of {first} is {value}.
{first} is a {value} by trade.
By trade, {first} is a {value}.
As a job, {first} works as a {value}.
What is the job of {name}?
What does {name} work as?
What is {name} by trade?
By trade, what is {name}?

city
Paris Rome Oslo Cairo Lima Madrid Vienna Dublin Athens Berlin Prague Tokyo Delhi Boston Denver Seoul Havana
Lisbon Warsaw Zurich Geneva Naples Munich Bergen
{first} lives in {value}.
The home of {first} is in {value}.
{first} has a home in {value}.
In {value} is the home of {first}.
The city where {first} lives is {value}.
Where does {name} live?
In which city is the home of {name}?
Which city does {name} live in?
Where is the home of {name}?

animal
cat dog horse goat parrot rabbit turtle snake hamster pony donkey duck goose pigeon lizard frog sheep canary
mouse ferret falcon owl hen spider
{first} keeps a {value} as a pet.
The pet of {first} is a {value}.
A {value} is the pet of {first}.
{first} owns a pet, a {value}.
As a pet, {first} owns a {value}.
What is the pet of {name}?
Which animal does {name} keep?
What pet does {name} own?
Which animal is the pet of {name}?

instrument
piano violin guitar flute drum trumpet cello harp banjo organ clarinet oboe tuba horn fiddle lute mandolin
trombone saxophone accordion viola bugle zither bassoon
{first} plays the {value}.
The instrument of {first} is the {value}.
{first} makes music on the {value}.
On the {value}, {first} makes music.
The instrument that {first} plays is the {value}.
Which instrument does {name} play?
What is the instrument of {name}?
On what does {name} make music?
What does {name} make music on?

colour
red blue green yellow purple orange black white brown pink grey silver golden crimson violet scarlet turquoise
beige maroon olive indigo amber cream teal
{first} likes the colour {value} best.
The best colour for {first} is {value}.
{value} is the colour that {first} likes.
Of all colours, {first} likes {value}.
The colour that {first} likes best is {value}.
Which colour does {name} like best?
What is the best colour for {name}?
Of all colours, which does {name} like?
Which colour is best for {name}?

drink
tea coffee milk water cider cocoa lemonade beer wine juice rum brandy whisky soda punch mead sherry gin vodka
syrup nectar broth ale port
{first} drinks {value} in the morning.
In the morning {first} drinks {value}.
The morning drink of {first} is {value}.
{first} starts the morning with {value}.
{first} drinks {value} to start the morning.
What does {name} drink in the morning?
What is the morning drink of {name}?
What does {name} start the morning with?
In the morning, what does {name} drink?

sport
tennis football chess golf boxing rowing hockey rugby cricket fencing judo sailing skiing cycling wrestling
archery polo squash bowling climbing running surfing darts swimming
The sport of {first} is {value}.
{first} trains in {value}.
{first} has {value} as a sport.
{value} is the sport of {first}.
The sport that {first} trains in is {value}.
What is the sport of {name}?
Which sport does {name} train in?
What does {name} have as a sport?
Which sport is the sport of {name}?

fruit
apples pears plums grapes lemons cherries figs dates melons peaches oranges limes mangoes bananas olives
quinces berries apricots kiwis currants papayas nuts guavas lychees
{first} grows {value} in the garden.
In the garden {first} grows {value}.
The garden of {first} is full of {value}.
{value} grow in the garden of {first}.
The garden where {first} grows {value} is full.
What does {name} grow in the garden?
What is the garden of {name} full of?
In the garden, what does {name} grow?
What grows in the garden of {name}?

vehicle
car bus bicycle tram truck van tractor scooter train boat ferry canoe wagon sledge taxi jeep carriage yacht
kayak raft coach lorry buggy glider
{first} travels by {value}.
On the road {first} uses a {value}.
{first} uses a {value} to travel.
To travel, {first} uses a {value}.
{first} travels on the road by {value}.
How does {name} travel?
What does {name} use to travel?
What does {name} use on the road?
How does {name} travel on the road?

language
French Dutch Greek Latin Arabic Polish Danish Turkish Hindi Swedish Russian Czech Welsh Irish Persian Korean
Spanish German Finnish Hebrew Basque Thai Swahili Tamil
{first} speaks {value} at home.
The language of {first} is {value}.
At home {first} speaks {value}.
{first} has {value} as a language.
The language that {first} speaks is {value}.
Which language does {name} speak?
What is the language of {name}?
What does {name} speak at home?
Which language does {name} speak at home?
"""
FIRST_NAMES = (
    "Mira Anton Clara Boris Dora Emil Flora Gustav Helga Ivan Julia Karl Lena Marco Nora Oscar Petra Quentin Rosa "
    "Simon Tilda Ulrich Vera Walter Xenia Yvonne Zoe Albert Berta Cedric Diana Edgar Fanny Gilbert Hanna Igor "
    "Jasmin Kuno Lydia Moritz Nadia Otto Paula Ralf Selma Theo Ursula Viktor"
).split()
LAST_NAMES = (
    "Talbot Brandt Castle Dover Ellis Foster Grant Harlow Ingram Jarvis Keller Lambert Mercer Norris Oakley "
    "Palmer Quincy Rowland Sutton Turner Underhill Vaughn Weaver Yates Zeller Archer Barlow Conrad Dalton Everett "
    "Fleming Garner Hobson Irving Jordan Kendall Lowell Morton Nelson Osborn Parker Ramsey Sheldon Thorne Upton "
    "Vernon Wallace York"
).split()


def _read_relations(texts: str) -> dict[str, dict[str, list[str]]]:
    """Name of a relation -> its `values`, `statements` and `questions`."""
    relations = {}
    for block in texts.strip().split("\n\n"):
        name, *lines = block.splitlines()
        statements, questions = ([line for line in lines if mark in line] for mark in ("{first}", "{name}"))
        values = " ".join(lines[: -len(statements) - len(questions)]).split()
        relations[name] = {"values": values, "statements": statements, "questions": questions}
    return relations


RELATIONS = _read_relations(TEXTS)


def is_test_person(first: str, last: str) -> bool:
    """Whether this combination of names is held out: one in eight, while every single name occurs in training."""
    return (FIRST_NAMES.index(first) * 5 + LAST_NAMES.index(last) * 3) % 8 == 0


class FactSheets:
    """Sheets of four facts about people, without end; everything drawn comes from the seed.

    `test`: people that training never shows; `unseen_wordings`: such wordings of statements and questions.
    """

    def __init__(self, seed: int, *, test: bool = False, unseen_wordings: bool = False):
        self.random = random.Random(seed)
        self.unseen_wordings = unseen_wordings
        self.people = [(a, b) for a in FIRST_NAMES for b in LAST_NAMES if is_test_person(a, b) == test]

    def _wording(self, relation: str, kind: str) -> str:
        wordings = RELATIONS[relation][kind]
        return wordings[-1] if self.unseen_wordings else self.random.choice(wordings[:-1])

    def _write(self, facts: dict[str, str], first: str) -> str:
        sentences = [self._wording(name, "statements").format(first=first, value=facts[name]) for name in facts]
        return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)

    def sheet(self) -> tuple[dict, dict[str, str]]:
        """A document `{title, text}` and its facts, relation -> value, in the order of the text."""
        first, last = self.random.choice(self.people)
        relations = self.random.sample(sorted(RELATIONS), N_FACTS)
        facts = {relation: self.random.choice(RELATIONS[relation]["values"]) for relation in relations}
        return {"title": f"{first} {last}", "text": self._write(facts, first)}, facts

    @staticmethod
    def of_different_people(n: int, draw: Callable[[], tuple[dict, dict]]) -> list[tuple[dict, dict]]:
        """So many sheets of what `draw` gives, no person twice."""
        sheets = {}
        while len(sheets) < n:
            document, facts = draw()
            sheets.setdefault(document["title"], (document, facts))
        return list(sheets.values())

    def question(self, document: dict, facts: dict[str, str]) -> tuple[str, str]:
        """A question about a sheet and its answer."""
        relation = self.random.choice(list(facts))
        return self._wording(relation, "questions").format(name=document["title"]), facts[relation]

    def pretraining_rows(self, n_rows: int, n_questions: int = 4, paraphrased: float = 0.2) -> Iterator[dict]:
        """Rows of stage 1: `{title, text, qas}`, questions drawn with replacement, or `{title, text, paraphrase}`.

        Asked once each, the answers already given would betray the others. A paraphrase, every fact in a wording drawn
        anew, has a row of its own, because it is twice as long as a question and would pad those.
        """
        for _ in range(n_rows):
            document, facts = self.sheet()
            if self.random.random() < paraphrased:
                first, _, _ = document["title"].partition(" ")
                yield {**document, "paraphrase": f"{document['title']}\n{self._write(facts, first)}"}
            else:
                pairs = [self.question(document, facts) for _ in range(n_questions)]
                yield {**document, "qas": [{"question": question, "answers": [answer]} for question, answer in pairs]}

    def retrieval_rows(
        self, n_rows: int, n_documents: int | tuple[int, int], n_sheets: int | None = None
    ) -> Iterator[dict]:
        """Rows of the other stages: `{question, answers, docs, pos_index}`, no person twice among the documents.

        Each has `n_documents`, or a number in that range, one of them the gold one. They are drawn from `n_sheets`; by
        default every row has its own.
        """
        pool = [self.sheet() for _ in range(n_sheets)] if n_sheets else None
        for _ in range(n_rows):
            n = n_documents if isinstance(n_documents, int) else self.random.randint(*n_documents)
            sheets = self.of_different_people(n, lambda: self.random.choice(pool) if pool else self.sheet())
            gold = self.random.randrange(n)
            question, answer = self.question(*sheets[gold])
            docs = [f"{document['title']}\n{document['text']}" for document, _ in sheets]
            yield {"question": question, "answers": [answer], "docs": docs, "pos_index": [gold]}


def write_files(folder: Path, scale: float = 1.0) -> None:
    """All data of clara-pico; `scale` shrinks the training files for a trial."""
    n_rows, n_sheets = int(40_000 * scale), max(100, int(8_000 * scale))
    write_lines(folder / "pretrain.jsonl", FactSheets(1).pretraining_rows(int(60_000 * scale)))
    write_lines(folder / "instruct.jsonl", FactSheets(2).retrieval_rows(n_rows, (1, 3)))
    write_lines(folder / "joint.jsonl", FactSheets(3).retrieval_rows(n_rows, 20, n_sheets))
    for name, unseen in (("test", False), ("test_wordings", True)):
        sheets = FactSheets(4, test=True, unseen_wordings=unseen)
        write_lines(folder / f"{name}_pretrain.jsonl", sheets.pretraining_rows(500, paraphrased=0.0))
        write_lines(folder / f"{name}_instruct.jsonl", sheets.retrieval_rows(500, (1, 3)))
        write_lines(folder / f"{name}_joint.jsonl", sheets.retrieval_rows(500, 20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("data/pico"))
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks the training files for a trial")
    arguments = parser.parse_args()
    write_files(arguments.output, arguments.scale)


if __name__ == "__main__":
    main()
