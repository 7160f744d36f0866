"""Clipping policies: what a user writes (spec), and the pure tensor code that it becomes (pipeline).

:data:`KINDS` maps the name of every kind of policy to its settings, in the order in which they usually stand.
"""

from gradiometer.policy.kinds import KINDS

__all__ = ["KINDS"]
