"""The mutation gate: planted bugs, each of which the suite must find.

    python -m tests.mutants                     plant every bug, one at a time; `killed k of n`
    python -m tests.mutants NAME …              only these, as in 'losses.MSE.bwd:*'
    python -m tests.mutants --list              what is planted
    python -m tests.mutants --generated --files 'funcnet/layers/*' --per-file 20 --quick

Most bugs are generated: `operators.py` makes them from the files in `targets.py`, and those that
change nothing are listed in `equivalent.py`. `written/` holds bugs written by hand, for the
derivations. `runner.py` judges a bug: in a process that has collected the tests (`collected.py`,
where `swap.py` plants it), or in a copy of the source tree. `forked.py` starts pytest without
importing torch anew, and `plugin.py` is what pytest loads.
"""
