"""What the library knows of other libraries' private names, one file for each.

Nothing else in lora_func names a private attribute of another package. Each file lists the names
that it relies on as `RELIES_ON`; tests/test_libraries.py looks every one of them up, and fails if
a release renames it. (`weights/bitsandbytes.py` is such a file too.)
"""
