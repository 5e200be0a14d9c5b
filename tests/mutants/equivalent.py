"""The generated mutants that no test can kill, since they compute the same; each with its reason.

The gate plants them too, and says so if one is killed after all.
"""

EQUIVALENT: dict[str, str] = {}
