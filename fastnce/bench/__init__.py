"""Time and memory of the losses against the ways they are computed today: `python -m fastnce bench`, in a checkout `bench/run.py`.

What a user of the losses never imports: `import fastnce` does not reach this folder, and the other packages that are measured here are
imported by nothing else.
"""
