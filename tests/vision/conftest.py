"""timm and open_clip import torchvision."""

import torchvision_operators  # noqa: F401
