"""Hand-optimized functions. Each is next to its plain definition, and tests compare the two.

A kernel stays if it saves at least 5% of a training step of some encoding that it serves; docs/performance.md has the
measurements and their command.
"""
