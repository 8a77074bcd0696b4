"""The tests and measurements for a GPU, in parts: `python -m bench gpu`. A file with main() is the part of its name."""
