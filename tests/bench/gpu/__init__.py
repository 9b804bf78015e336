"""The benchmark of a GPU: `python -m tests.bench.gpu`; it needs torch and transformers, and nothing of a server."""
