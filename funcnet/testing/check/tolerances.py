"""Every tolerance of the check, with its reason.

ε is `torch.finfo(dtype).eps` of the dtype that is judged. The *move* of a number is how far it
moves when the inputs are nudged by a relative ε (see `rounding`).
"""

from __future__ import annotations

import torch

# --- Rounding

# Moves: a sum rounds at every term, where a nudge moves its inputs once. 1000 moves are still 2e-13
# in float64, so it can be generous. Half precision accumulates its sums in float32: over all layers
# of the package its entries are at most 5 moves off, those of float32 at most 9.
SAFETY = {torch.float64: 1000.0, torch.float32: 64.0, torch.float16: 16.0, torch.bfloat16: 16.0}
# Roundings of y that a function may be off its reference: the two compute in other ways.
FROM_REFERENCE = 1000.0
# ε that the factor between a leaf and float64's may be off 1, besides one move of its entries, most
# of which cancel: 2 over all layers of the package. So a factor is seen from 4 to 6 ε on: 3 to 5 %
# in bfloat16, 0.4 to 0.6 % in float16 and, in leaves of many entries, 7e-7 in float32.
FACTOR = 3.0
# ε that a gradient as a whole is off float64's at most, where that is of the same x: most are.
ROUGHLY = 64.0
# ε off 1 above which a factor is looked at beside x, too, where the roundings are others.
SUSPICIOUS = 2.0
# ε that rounding may shift a factor by where the mean of several points tells: coarser roundings
# are the same at each of them.
STEADY = 16.0
# Standard errors of that mean which are forgiven, besides `FACTOR`. Over all layers of the package,
# in half precision, means are off by at most a quarter of both.
ERRORS_OF_MEAN = 4.0
# How many times as far from differences of y as these are from each other a gradient may be, in
# squares, in its own dtype. Right gradients were up to 2 times as far, doubled ones at least 10.
LIKE_STEPS = 4.0
# How many times nearer, in squares, a shorter step has to be to a gradient to excuse it.
SHORTER = 16.0
# Share of the leaf's largest move that is added to each entry's own: an entry that stood still in
# every trial is not exact, and algorithms share sums between entries.
LEAF_SHARE = 1 / 64
# Median moves of a leaf above which a move is a kink's, and no rounding that others share.
KINKED = 1024.0
# Share of the move by a nudge of √ε above which that by ε is no smaller: smooth ones fall by √ε.
UNDECIDED = 1 / 16
# Smallest normal numbers of the dtype: products underflow there.
SMALLEST = 64.0
# ε of an entry, between two computations in one dtype: they add in different orders. Half precision
# adds in float32, and 64 ε are half of a number in bfloat16.
SAME_DTYPE = {torch.float64: 64.0, torch.float32: 64.0, torch.float16: 8.0, torch.bfloat16: 8.0}
# ε of an entry, from float64: the inputs, the intermediate results and the result are rounded.
ACROSS_DTYPES = 8.0
# ε of y nearer to 0 on the ray through x: two or three roundings of terms that cancel in a tail.
TAIL = 2.0
# Growth from x/8 to x/64 above which what grows has no tail: 1/√x grows by 2.8. It may be smaller
# by as much than that from x to x/8.
GROWING = 2.0
# The same of a gradient in float64, ours or autograd's: y·(1 − y) is off by that for sigmoid(24).
IN_TAILS = 16.0
# Share of y's distance from float64 that it may change by where all entries move by 3 %: it changes
# by 2 to 10 % where a dtype's own ε makes it, and by all of it where it is rounding.
SMOOTH = 0.5
# Share of the dtype's largest number above which nothing is judged: sums overflow on the way.
OVERFLOW = 1 / 64

# --- Laws

# Moves of y that a batch may be off its examples. If it is off by more, examples are coupled.
COUPLED = 1000.0
# Share of its terms that the sides of a law may differ by, a thousandth of the usual `rtol`: the
# mistakes that laws find are larger, such as 6e-8 by way of float32. Torch's gradient of a matrix
# exponential is off by 4e-10 of its largest entry for some norms.
LAW_TERMS = 1e-9
# The same where grad is many times as large, so many times as much of the leaf's largest entry, up
# to this share: that gradient loses as many digits, and is off by up to 0.6 % for 2^40. What is
# clipped is off by all of it.
LAW_FAR = 1 / 16
# Allowed roundings of a gradient that they may differ by too: a law adds several gradients.
LAW_ROUNDING = 16.0

# --- Numeric derivatives

# Share of rtol that is negligible: a numeric derivative that exact needs no second one. No more is
# forgiven along a direction, where the right entries dilute a wrong one.
NEGLIGIBLE = 1e-3
# Share of rtol that many leaves together may be off, of the smallest derivative among them; what is
# wrong in one leaf is not diluted by the others.
ALONE = 0.1
# Roundings of y that they may be off where its rounding hides more than that.
NEARLY = 128.0
# Moves of y in a central difference: two values, and a move that is known from two trials only.
CENTRAL_ROUNDING = 4.0
# Roundings that derivatives by different steps may differ by where f is affine: one of each.
AFFINE = 2.0
# Moves of y in the jump of a slope, which holds 4·(1 + 2 + 1) values of y at half a step.
JUMP_ROUNDING = 16.0
# Estimated errors that a right derivative may be off: extrapolation only guesses its own error.
ESTIMATE = 8.0
# Relative error above which a numeric derivative tries smaller steps than usual.
STEADY_SLOPE = 1e-6
# Share of y, or of its change by a step of 1, that counts as no change.
FLAT = 1e-6
# Share of the jump at a kink that a slope may be off the middle; 1 % is for the jump's own error.
HALF_JUMP = 0.505
# Roundings above which a Taylor remainder counts: six halvings of the step show its power.
TAYLOR_ROUNDING = 64.0
# Power of h that the remainder of a wrong derivative stays below: between its 1 and the right 2.
WRONG_POWER = 1.5
# Relative error above which a numeric derivative is left out of `Errors`.
SCORED = 1e-6

# --- Guesses at the cause

# Relative difference up to which an explanation fits an entry, and an entry counts as right.
ALIKE = 1e-6
# The same, relative to the leaf's largest entry: sums that cancel are nothing but rounding.
ALIKE_IN_LEAF = 1e-10
