"""How far the tests go that could go on for ever: a little each time, far in `nox -s soak`."""

import os

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
MUTATED_FILES = 20_000 if SOAK else 800
KILLS = 200 if SOAK else 20
SECONDS_OF_THREADS = 60.0 if SOAK else 1.5
