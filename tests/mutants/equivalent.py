"""The generated mutants that no test can kill, since they compute the same; each with its reason.

The gate plants them too, and says so if one is killed after all. It runs only their first tests.
"""

EQUIVALENT: dict[str, str] = {}
