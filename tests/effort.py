"""How far the tests go that could go on for ever: a little each time, far in `nox -s soak`."""

import os

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
EXAMPLES = 30 if SOAK else 20  # that hypothesis draws: layers for each case of a law
MUTATED_FILES = 5_000 if SOAK else 800
KILLS = 100 if SOAK else 20
SECONDS_OF_THREADS = 30.0 if SOAK else 1.5
SUMMARY = (
    f"{EXAMPLES} examples, {MUTATED_FILES} mutated files, {KILLS} kills, "
    f"{SECONDS_OF_THREADS:g} seconds of threads"
)
