"""The comparison of Li & Liang (2021) on the bundled model: what a prefix does beside what else could be tuned."""
