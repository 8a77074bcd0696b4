"""Time, memory and accuracy of the losses beside the ways they are computed today: `python -m bench`. No part of the installed package, and
the other packages that are measured here are imported by nothing else.
"""
