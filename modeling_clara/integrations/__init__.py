"""Retrievers for other frameworks: langchain, llama_index, haystack and mteb, each in a module of its own.

Nothing is imported here: `from modeling_clara.integrations.langchain import CLaRaRetriever` imports that framework.
"""
