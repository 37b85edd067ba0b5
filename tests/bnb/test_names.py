"""The names of bitsandbytes that the library relies on, looked up as in test_libraries.py."""

from __future__ import annotations

import pytest
from test_libraries import missing, names_of

from lora_func.weights import bitsandbytes


@pytest.mark.parametrize(("package", "name"), names_of(bitsandbytes))
def test_it_is_still_there(package, name):
    assert missing(package, name) is None
