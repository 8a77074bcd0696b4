"""The compiled libraries of csrc/: find.py says where they are and loads them, build.py compiles them."""
