"""The service: an engine that batches questions, and what speaks HTTP in front of it."""
