"""The parts of `recipes/evaluate.py`; `evaluation.py` has the whole way in one place."""
