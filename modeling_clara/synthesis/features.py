"""What a text holds, by rules that need no model: words, numbers, names, scripts, language.

The checks compare these of a document with these of a pair or a paraphrase.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from ..text_clara import NO_SPACES, SPACELESS

CACHED = 1024  # texts whose features are remembered: a document is compared with all of its pairs
ACCENTS = re.compile("[\u0300-\u036f]")
INITIALS = re.compile(r"\b(?:[^\W\d_]\.){2,}")  # U.L.A.
WORD = re.compile(f"[{NO_SPACES}]|\\d+|[^\\W\\d_{NO_SPACES}]+")
SENTENCE_START = re.compile(r"[.!?:;…。！？\n\"“„«(\[]")
NAME_PART = re.compile(r"[^\W_]+(?:['’.&-][^\W_]+)*")
QUOTED = re.compile(r"[\"“„«「『]([^\"“”„«»「」『』]{2,80})[\"”“»」』]")

# 1,200.50; 1.200,50; 1 200 with a narrow or no-break space; 1'200; 3.5; 3,5
SEPARATED = "\\d{1,3}(?:[,.'’\u00a0\u202f\u2009]\\d{3})+(?!\\d)(?:[.,]\\d+)?"
NUMBER = re.compile(f"{SEPARATED}|\\d+(?:[.,]\\d+)*")
SPACED = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?!\d)([.,]\d+)?")  # 12 000
YEARS = re.compile(r"\b(\d{2})(\d{2})\s?[-–—/]\s?(\d{2})\b(?!\d)")  # 2012-13
SHORT_YEARS = re.compile(r"(?<!\w)['’‘](\d\d)(?!\d)")  # '76
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALED = re.compile(rf"(?<![a-z0-9])({NUMBER.pattern}|[a-z]{{1,9}})[\s-]+({'|'.join(SCALES)})s?\b", re.IGNORECASE)
UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
UNITS = f"{UNITS} seventeen eighteen nineteen twenty".split()
TENS = "thirty forty fifty sixty seventy eighty ninety hundred".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
NUMBER_WORDS = {word: str(value) for value, word in enumerate(UNITS)}
NUMBER_WORDS |= {word: str(value) for value, word in zip(range(30, 101, 10), TENS, strict=True)}
NUMBER_WORDS |= {word: str(value) for value, word in enumerate(ORDINALS, 1)}
SPELLED = {word: int(value) for word, value in NUMBER_WORDS.items()}  # those that make numbers of several words
NUMBER_WORDS |= {"once": "1", "twice": "2", "both": "2", "single": "1", "dozen": "12", "half": "0.5"}

MONTHS = "january february march april may june july august september october november december".split()
MONTHS = {word: number for number, word in enumerate(MONTHS, 1)}
DATE = re.compile(r"(?<!\d)(?:\d{4}-(\d\d)-\d\d|(\d\d?)[./](\d\d?)[./]\d{4})(?!\d)")

LANGUAGES = "DANISH DUTCH FRENCH GERMAN ITALIAN NORWEGIAN PORTUGUESE RUSSIAN SPANISH SWEDISH TURKISH".split()
MIN_WORDS = 6  # of a text whose language can be told
MIN_SHARE = 0.2  # of its words that are function words
CLEAR = 1.5  # times as many function words as of any other language


@functools.lru_cache(CACHED)
def words(text: str) -> tuple[str, ...]:
    """The words of a text without case and Latin accents; a character of a script without spaces is a word.

    >>> words("The U.L.A. of Kętrzyn, 東京 5km")
    ('the', 'ula', 'of', 'ketrzyn', '東', '京', '5', 'km')
    """
    text = INITIALS.sub(lambda found: found[0].replace(".", ""), text)
    text = ACCENTS.sub("", unicodedata.normalize("NFKD", text).casefold())
    return tuple(WORD.findall(unicodedata.normalize("NFC", text)))


def ngrams(items: Iterable[str], n: int) -> set[tuple[str, ...]]:
    """All runs of n items."""
    items = tuple(items)
    return {items[start : start + n] for start in range(len(items) - n + 1)}


def jaccard(left: set, right: set) -> float:
    """The share of what both have in what either has, 0 to 1."""
    return len(left & right) / len(left | right) if left or right else 1.0


# --- numbers ---------------------------------------------------------------------------------------------------------


def _digits(text: str) -> str:
    """The text with every decimal digit as an ASCII one."""
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(c)) if unicodedata.decimal(c, None) is not None else c for c in text)


def _plain(whole: str, decimals: str = "") -> str:
    whole, decimals = re.sub(r"\D", "", whole).lstrip("0") or "0", decimals.rstrip("0")
    return f"{whole}.{decimals}" if decimals else whole


def readings(number: str) -> frozenset[str]:
    """What a number can mean, without separators and needless zeros: 1.200 is 1200 or 1.2.

    >>> sorted(readings("1.200")), sorted(readings("1,200.50")), sorted(readings("007"))
    (['1.2', '1200'], ['1200.5'], ['7'])
    """
    return _values(number) or frozenset(map(_plain, re.split(r"\D", number)))


def _values(number: str) -> frozenset[str]:
    """What it can mean as one number; nothing if it is a row of them, such as 17.09.1931 or 1.26.4."""
    marks = re.findall(r"\D", number)
    if not marks:
        return frozenset({_plain(number)})
    found, (whole, decimals) = set(), re.split(rf"{re.escape(marks[-1])}(?=\d+$)", number)
    if marks.count(marks[-1]) == 1 and marks[-1] in ".,":  # the last mark may begin the decimals
        found.add(_plain(whole, decimals))
    if len(set(marks)) == 1 and re.fullmatch(SEPARATED, number):
        found.add(_plain(number))
    if marks.count(marks[-1]) == 1 and marks[-1] == ",":
        found -= {_plain(whole, decimals)} if len(decimals) == 3 and len(marks) == 1 else set()
    return frozenset(found)


def _scaled(text: str) -> Iterator[tuple[int, str]]:
    """(place, value) of 1.5 million and of two hundred."""
    for match in SCALED.finditer(text):
        number = NUMBER_WORDS.get(match[1].casefold(), match[1])
        if not number[0].isdigit():
            continue
        power = SCALES[match[2].casefold()]
        for value in readings(number):
            whole, _, decimals = value.partition(".")
            shifted = decimals.ljust(power, "0")
            yield match.start(), _plain(whole + shifted[:power], shifted[power:])


def spelled(text: str) -> Iterator[tuple[str, str]]:
    """(words, value) of English numbers of several words.

    >>> list(spelled("Twenty-one of the first two hundred and fifty, in nineteen thirty-one"))
    [('twenty one', '21'), ('two hundred and fifty', '250'), ('nineteen thirty one', '1931')]
    """
    run, total, group = [], 0, 0
    for word in [*words(text), ""]:
        value, scale = SPELLED.get(word), SCALES.get(word)
        if run and scale:
            total, group = (total, group * 100) if scale == 2 else (total + group * 10**scale, 0)
        elif run and word == "and" and group % 100 == 0:
            pass
        elif (
            run and value and (group % 100 == 0 and value < 100 or group % 100 >= 20 and not group % 10 and value < 10)
        ):
            group += value
        elif len(run) == 1 and 11 <= group <= 20 and value and value >= 10:
            group = 100 * group + value
        else:
            run = run[:-1] if run[-1:] == ["and"] else run
            if len(run) > 1:
                yield " ".join(run), str(total + group)
            run, total, group = [], 0, value or 0
            if value is None:
                continue
        run.append(word)


@functools.lru_cache(CACHED)
def numbers(text: str) -> tuple[tuple[str, frozenset[str]], ...]:
    """(as written, readings) of every number, and of every part of a date; of words only those of several words.

    Units are not read, nor single digits in the middle of a word.

    >>> [written for written, _ in numbers("1,000 km in 2012, at 5km H2O, an A380 of the 90s, 17.9.31, twenty-two")]
    ['1,000', '2012', '5', '380', '90', '17', '9', '31', 'twenty two']
    """
    text, found, scaled = _digits(text), [], {}
    for place, value in _scaled(text):
        scaled.setdefault(place, set()).add(value)
    for match in NUMBER.finditer(text):
        before = text[match.start() - 1 : match.start()]
        if before.isalpha() and not SPACELESS.match(before) and len(match[0]) == 1:
            continue
        if values := _values(match[0]) | scaled.get(match.start(), set()):
            found.append((match[0], frozenset(values)))
        else:
            found += [(part, frozenset({_plain(part)})) for part in re.split(r"\D", match[0])]
    return (*found, *((written, frozenset({value})) for written, value in spelled(text)))


@functools.lru_cache(CACHED)
def known_numbers(text: str) -> frozenset[str]:
    """Every reading that a claim may take from a text: also number words, ends of year ranges, digits inside words."""
    text = _digits(text)
    found = {value for match in NUMBER.finditer(text) for value in readings(match[0])}
    found |= {value for _, value in _scaled(text)}
    found |= {f"{century}{end}" for century, _, end in YEARS.findall(text)}
    found |= {f"{century}{year}" for year in SHORT_YEARS.findall(text) for century in (18, 19, 20)}
    found |= {NUMBER_WORDS[word] for word in words(text) if word in NUMBER_WORDS}
    found |= {value for _, value in spelled(text)}
    found |= {value for whole, rest in SPACED.findall(text) for value in readings(whole.replace(" ", "") + rest)}
    found |= {str(MONTHS[word]) for word in words(text) if word in MONTHS}
    for match in NUMBER.finditer(text):  # 3:16 and 2,3 are two numbers each
        found |= {_plain(part) for part in re.split(r"\D", match[0])}
    return frozenset(found)


def months(text: str) -> frozenset[str]:
    """English names of the months of dates in digits; of 5/9/2012 both.

    >>> sorted(months("from 2012-05-03 to 17.09.2013"))
    ['may', 'september']
    """
    found = {int(part) for match in DATE.findall(_digits(text)) for part in match if part}
    return frozenset(word for word, number in MONTHS.items() if number in found)


# --- names -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(CACHED)
def names(text: str, starts_count: bool = False) -> tuple[str, ...]:
    """Names by a rule of thumb: runs of capitalised words, and what stands in quotation marks.

    Function words at the beginning of a sentence are left out, and other single words there unless `starts_count`:
    in prose most are no names, in short answers most are. In scripts without case only quoted names are found;
    `check_answer` compares all of their words.

    >>> names("Visitors of the Eiffel Tower know Paris and “the old café”.")
    ('Eiffel Tower', 'Paris', 'the old café')
    """
    found, run, end = [], [], 0
    for match in NAME_PART.finditer(text):
        gap, word, end = text[end : match.start()], match[0], match.end()
        starts = match.start() == len(gap) or bool(SENTENCE_START.search(gap))
        if starts or not gap.isspace() or "\n" in gap:
            found.append(run)
            run = []
        if not word[0].isupper():
            found.append(run)
            run = []
        elif not starts or words(word)[0] not in _any_function_word():
            run.append((word, starts))
    runs = [run for run in [*found, run] if len(run) > 1 or (run and (starts_count or not run[0][1]))]
    found = [" ".join(word for word, _ in run) for run in runs]
    return tuple(dict.fromkeys([*found, *QUOTED.findall(text)]))


def names_about(document: str, text: str, starts_count: bool = False) -> tuple[str, ...]:
    """Names in a text about a document; in German, where every noun has a capital, the last two words of longer ones.

    An architect may become a builder, but he is still Otto Lindner.
    """
    found = names(text, starts_count)
    if language(document) != "GERMAN":
        return found
    return tuple(" ".join(name.split()[-2:]) for name in found if " " in name)


# --- script and language ---------------------------------------------------------------------------------------------


@functools.cache
def _script(character: str) -> str:
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    return {"HIRAGANA": "KANA", "KATAKANA": "KANA", "FULLWIDTH": "LATIN"}.get(name, name)


@functools.lru_cache(CACHED)
def scripts(text: str) -> dict[str, float]:
    """The share of each script in the letters of a text: LATIN, CYRILLIC, CJK and so on, as Unicode names them."""
    counts = Counter(_script(character) for character in text if character.isalpha())
    return {script: count / counts.total() for script, count in counts.most_common()}


@functools.cache
def _function_words() -> dict[str, frozenset[str]]:
    from bm25s import stopwords

    lists = {language: getattr(stopwords, f"STOPWORDS_{language}") for language in LANGUAGES}
    lists["ENGLISH"] = stopwords.STOPWORDS_EN_PLUS
    return {name: frozenset(words(" ".join(known))) for name, known in lists.items()}


@functools.cache
def _any_function_word() -> frozenset[str]:
    return frozenset().union(*_function_words().values())


def function_share(text: str, language: str) -> float:
    """The share of a text's words that are function words of a language, 0 to 1."""
    found = words(text)
    return sum(word in _function_words()[language] for word in found) / len(found) if found else 0.0


@functools.lru_cache(CACHED)
def language(text: str) -> str | None:
    """The language with by far the most function words, of those that bm25s has lists of; None if it is not clear."""
    found = words(text)
    if len(found) < MIN_WORDS:
        return None
    shares = Counter({name: function_share(text, name) for name in _function_words()})
    (best, most), (_, second) = shares.most_common(2)
    return best if most >= MIN_SHARE and most >= CLEAR * second else None
