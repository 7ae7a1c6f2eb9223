"""The parts of `recipes/evaluate.py`; `cli.py` has the whole way in one place."""
