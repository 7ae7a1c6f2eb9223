"""Builds, changes, verifies and publishes compressed corpora; installed only.

It imports no model: one is passed in. The class is in `corpus.py`.
"""
