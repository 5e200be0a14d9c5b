"""The mutation gate: planted bugs, each of which the suite must find.

    python -m tests.mutants                 plant every bug, one at a time; `killed k of n`
    python -m tests.mutants NAME …          only these
    python -m tests.mutants --list          what is planted, and why it matters

`table.py` holds the bugs, `runner.py` plants one in a copy of the source tree and runs the suite
there, `plugin.py` is what pytest loads in the copy.
"""
