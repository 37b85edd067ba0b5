"""One safetensors file for an adapter: the parameters, the constants, and how to use them again."""
