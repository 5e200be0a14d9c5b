"""The generated mutants that no test can kill, since they compute the same; each with its reason.

The gate plants them too, and says so if one is killed after all. It runs only their first tests.
"""

_IN_PLACE = "working out of place costs memory and changes no number"
_SHAPE = "only the shape of this residual is read"
_EARLIER = "going on to earlier layers costs time and changes no number"

EQUIVALENT: dict[str, str] = {
    "layers.activations.Activation:flip-flag:1": _IN_PLACE,
    "layers.activations.Activation._bwd_over:flip-flag:1": "every caller passes input_grad",
    "layers.activations.Activation._bwd_over:drop-need:1": "only called where dx is needed",
    "layers.upsample.Upsample2d:flip-flag:1": _IN_PLACE,
    "layers.upsample.Upsample2d.fwd:drop-argument:1": "either memory format holds y's numbers",
    "layers.upsample.Upsample2d.fwd:sibling:1": _SHAPE,
    "layers.upsample.Upsample2d.bwd:sibling:1": "x is empty where grad is",
    "losses.MSE.bwd:off-by-one:3": "max(count, 1) is 1 for a count of 0, too",
    "combinators.Sequential.fwd:sibling:1": _SHAPE,
    "combinators.Sequential.apply:condition:2": "a copy costs memory and changes no number",
    "combinators.Sequential._bwd_consuming:flip-flag:1": "every caller passes input_grad",
    "combinators.Sequential._backward:condition:4": _IN_PLACE,
    "combinators.Sequential._forward:condition:2": _IN_PLACE,
    "combinators._first_to_learn:drop-term:1": _EARLIER,
    "combinators._first_to_learn:drop-term:2": "never called without layers",
    "combinators._first_to_learn:drop-term:4": _EARLIER,
    "combinators._first_to_learn:off-by-one:3": _EARLIER,
    "combinators._first_to_learn:sibling:1": _EARLIER,
    "combinators._first_to_learn:swap-operands:1": _EARLIER,
}
