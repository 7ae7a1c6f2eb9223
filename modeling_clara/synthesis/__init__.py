"""Training data out of documents: a language model writes, checks and the model verify, what fails is kept apart."""
