"""The formats of other libraries. The rest of lora_func imports nothing from here."""
