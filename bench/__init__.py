"""Time, memory and accuracy of the losses beside the ways they are computed today: `python -m bench`.

It is no part of the installed package. The other packages that are measured here are imported nowhere else.
"""
