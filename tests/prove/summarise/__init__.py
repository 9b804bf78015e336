"""Summarisation as in Li & Liang (2021), on a small BART: prefixes on every attention beside what else can be tuned."""
