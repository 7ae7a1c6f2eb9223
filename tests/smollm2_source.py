"""Small files of every kind that the data of clara-smollm2-135m is made of. It asserts nothing."""

import gzip
import json
from pathlib import Path

N_PASSAGES = 80
TOWN = (
    "In {year} the town {n} had a harbour, and its mayor was Otto Berg {n}, who liked old boats very much. It had "
    "a mill and a well, and a road led to it from the hills in the east, where sheep were kept."
)


def passage(n: int) -> dict:
    pairs = [{"question": f"Who was mayor of {n}?", "answers": [f"Otto Berg {n}"]}]
    return {"title": f"Town {n}", "text": TOWN.format(year=1800 + n, n=n), "qas": pairs}


def document(n: int) -> str:
    return f"Town {n}\n{passage(n)['text']}"


def multihop(name: str, start: int) -> list[dict]:
    """Rows of six documents, the first two gold."""
    return [
        {
            "id": f"{name}{index}",
            "question": f"Who of {name} {index}?",
            "answers": ["Otto"],
            "docs": [document(n) for n in range(start + index, start + index + 6)],
            "pos_index": [0, 1],
        }
        for index in range(3)
    ]


def write_source(folder: Path) -> Path:
    """Every kind of data once; the last multi-hop row has a gold document of a development question."""
    passages = [passage(n) for n in range(N_PASSAGES)]
    texts = [{"id": n, "title": f"TOWN {n}", "text": passage(n)["text"]} for n in range(201, 211)]
    files = {
        "passages_squad": passages[:40],
        "passages_nq": passages[40:62],
        "passages_other": passages[62:],
        "corpus_wikipedia_2wiki": [*texts, {"id": "no title", "text": "No title has this."}],
        "corpus_other": [*passages, {**passage(999), "id": "1", "title": "New"}],
        "multihop_hotpotqa_train": multihop("hotpot", 100),
        "multihop_musique_train": [*multihop("musique", 120), *multihop("gold elsewhere", 199)[:1]],
        "multihop_hotpotqa_dev": multihop("dev", 200),
        "unanswerable_squad2": [{"question": "Why?", "answers": [], "docs": [document(n)]} for n in range(9)],
    }
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder
