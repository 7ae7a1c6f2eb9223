"""The parts of `recipes.evaluate`; `evaluation.py` has the whole way in one place."""
