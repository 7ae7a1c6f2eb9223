"""Small files of every kind that the data of clara-smollm2-135m is made of. It asserts nothing."""

import gzip
import json
from pathlib import Path

TOWN = (
    "In {year} the town {n} had a harbour, and its mayor was Otto Berg {n}, who liked old boats very much. It had "
    "a mill and a well, and a road led to it from the hills in the east, where sheep were kept."
)


def passage(n: int) -> dict:
    pairs = [{"question": f"Who was mayor of {n}?", "answers": [f"Otto Berg {n}"]}]
    return {"title": f"Town {n}", "text": TOWN.format(year=1800 + n, n=n), "qas": pairs}


def multihop(name: str, start: int) -> list[dict]:
    """Rows of six documents."""
    rows = []
    for index in range(3):
        docs = [f"Town {n}\n{passage(n)['text']}" for n in range(start + index, start + index + 6)]
        row = {"id": f"{name}{index}", "question": f"Who of {name} {index}?", "answers": ["Otto"], "docs": docs}
        rows.append({**row, "pos_index": [0, 1]})
    return rows


def write_source(folder: Path) -> Path:
    """Every kind of data once."""
    folder.mkdir(exist_ok=True)
    texts = [{"id": str(n), "title": f"Town {n}", "text": passage(n)["text"]} for n in range(300, 310)]
    unanswerable = [
        {"question": "Why?", "answers": [], "docs": [f"Town {n}\n{passage(n)['text']}"]} for n in (400, 401)
    ]
    files = {
        "passages_squad": [passage(n) for n in range(40)],
        "passages_nq": [passage(n) for n in range(40, 80)],
        "corpus_wikipedia_2wiki": texts,
        "multihop_hotpotqa_train": multihop("hotpot", 100),
        "multihop_musique_train": multihop("musique", 120),
        "multihop_hotpotqa_dev": multihop("hotpot-dev", 200),
        "unanswerable_squad2": unanswerable,
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder
