"""What a GPU has to show, in parts: `python -m bench gpu`. A file with main() is the part of its name."""
