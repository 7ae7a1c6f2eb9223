"""Retrievers for other frameworks: langchain, llama_index, haystack, and mteb, each in a module and an extra of its name.

Nothing is imported here: `from modeling_clara.integrations.langchain import CLaRaRetriever` imports that framework.
"""
