"""A deterministic simulator: the real cores and the real decisions of their shells, in a world made of one heap.

Everything random comes from one seed; time is virtual; there is no thread, no socket and no event loop. See README.md's
section on the simulator for how to run it, and world.py for what it is made of.
"""
