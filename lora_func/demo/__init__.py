"""The main job on real input: `python -m lora_func.demo` trains an adapter of a language model and reports what happened."""
