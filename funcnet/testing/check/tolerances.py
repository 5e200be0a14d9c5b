"""Every tolerance of the check, with its reason.

ε is `torch.finfo(dtype).eps` of the dtype that is judged. The *move* of a number is how far it
moves when the inputs are nudged by a relative ε (see `rounding`).
"""

from __future__ import annotations

import torch

# --- Rounding: an entry may be off by

# so many moves. A sum rounds at every term, where a nudge moves its inputs once. 1000 moves are
# still 2e-13 in float64, so it can be generous. Half precision accumulates sums in float32.
SAFETY = {torch.float64: 1000.0, torch.float32: 128.0, torch.float16: 32.0, torch.bfloat16: 32.0}
# this share of the leaf's largest move: an entry that stood still in every trial is not exact, and
# algorithms share sums between entries;
LEAF_SHARE = 1 / 64
# so many of the dtype's smallest normal numbers: products underflow there;
SMALLEST = 64.0
# so many ε of itself between computations in one dtype, which add in different orders;
SAME_DTYPE = 64.0
# so many ε of itself from float64: inputs, intermediate results and result are rounded.
ACROSS_DTYPES = 8.0
# Above this share of the dtype's largest number nothing is judged: sums overflow on the way.
OVERFLOW = 1 / 64

# --- Laws

# Examples are coupled if y of a batch is so many moves off the examples' own.
COUPLED = 1000.0
# The sides of a law may differ by this share of its terms: the mistakes that laws find are large.
LAW_TERMS = 1e-10
# They may also differ by so many roundings of a gradient: a law adds several, each of them rounded.
LAW_ROUNDING = 16.0

# --- Numeric derivatives

# This share of rtol is negligible. A numeric derivative that exact needs no second one. Along a
# direction no more is forgiven, since the right entries dilute a wrong one.
NEGLIGIBLE = 1e-3
# Moves of y in a central difference: of two values, known from two trials only.
CENTRAL_ROUNDING = 4.0
# Derivatives by different steps agree, so f is affine, up to one rounding of each.
AFFINE = 2.0
# Moves of y in the jump of a slope, which holds 4·(1 + 2 + 1) values of y at half a step.
JUMP_ROUNDING = 16.0
# A right derivative may be off by so many estimated errors: extrapolation guesses its own error.
ESTIMATE = 8.0
# Any slope between the sides of a kink is at most half the jump off their mean; 1 % is for the
# error of the jump.
HALF_JUMP = 0.505
# A Taylor remainder counts above so many roundings: six halvings of the step show its power.
TAYLOR_ROUNDING = 64.0
# The remainder falls as h² if the derivative is right and as h if it is wrong; this is in between.
WRONG_POWER = 1.5
# A numeric derivative with a larger relative error is left out of the score of errors.
SCORED = 1e-6

# --- Guesses at the cause

# An explanation fits an entry, and an entry counts as right, up to this relative difference.
ALIKE = 1e-6
# The same relative to the leaf's largest entry: sums that cancel are nothing but rounding.
ALIKE_IN_LEAF = 1e-10
