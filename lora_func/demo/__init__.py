"""`python -m lora_func.demo` trains an adapter of a language model and writes a report."""
