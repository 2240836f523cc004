"""A sweep trains several arms, each in its own process. Importing this package does not import JAX.

arms.py      the config of each arm, its setting and status; the claims and their dates
pool.py      the launcher of this machine: processes, signals, retries
shares.py    equal shares of this machine
tables.py    the plan, the time left, and how each arm ended
main.py      the sweep itself, and the table of launchers
"""
