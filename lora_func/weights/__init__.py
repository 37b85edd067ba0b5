"""How layers hold their matrices. A new way is one class, and one line in `table.KINDS`."""
