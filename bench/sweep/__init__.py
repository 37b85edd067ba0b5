"""Every variant, with its learning rate tuned, on the same data: `python -m bench.sweep --help`.

docs/sweep.md is the protocol. Read `protocol.py` first, then `train.py`.
"""
