"""The check of hand-written gradients: `check_vjp`, `check_function` and what serves them alone.

The files, in the order in which a check comes to them, with the errors that they find:

    vjp, function   the two checks, from first to last
    case            a layer or loss with its arguments: a function of its leaves
      function_case   anybody's function of tensors, with autograd's gradients
    contract        calls that disagree, or change from call to call
      fitting         wrong trees, shapes, dtypes or devices
      purity          writes to inputs, global random states, results that share memory
      in_place        broken promises of what works in place
      state           what is kept from call to call
    surroundings    memory layouts, an empty batch or vmap that change results, a wrong init
    search          wrong entries (`finding`), in float64: where they are looked for
      oracles         what refutes an entry: autograd, central differences, Taylor's remainder
      beside          points beside x, away from ties and kinks
    laws            what is not linear in grad, not the sum of examples, not 0 where it is frozen
    precision       what is further from float64 than rounding explains, in x's own dtype
      compared        entries and factors that rounding does not explain
      own_dtype       the gradient of what computes in a narrower dtype, which `casts` finds
    keyed           masks that do not follow the key, gradients that are wrong for some keys
    report          the message, with a guess at the mistake (`diagnose`), the layer of a network
                    that is wrong alone, and code that replays the case (`replay`)

`rounding` estimates what rounding moves, of y and of gradients; `tolerances` says how many times
that is forgiven, and why; `comparison` compares entries, `agreement` whole results that should be
the same.
"""

from funcnet.testing.check.comparison import Errors
from funcnet.testing.check.function import check_function
from funcnet.testing.check.vjp import check_vjp, inspect_vjp

__all__ = ["Errors", "check_function", "check_vjp", "inspect_vjp"]
