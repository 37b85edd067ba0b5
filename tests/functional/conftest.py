"""Laplace imports torchvision, and posteriors warns of tensordict's plans when it is imported."""

import warnings

import torchvision_operators  # noqa: F401

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import laplace  # noqa: F401
    import opacus  # noqa: F401
    import posteriors  # noqa: F401
