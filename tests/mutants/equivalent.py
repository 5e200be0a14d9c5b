"""The generated mutants that no test can kill, since they compute the same; each with its reason.

The gate plants them too, and says so if one is killed after all. It runs only their first tests.
"""

_REPR = "the repr of a layer leaves out what its constructor does not take"
_TUPLE = "torch.Size is a tuple"
_IN_PLACE = "working out of place costs memory and changes no number"
_NOT_NEEDED = "the frame drops a gradient that nobody needs"
_COPY = "a copy costs memory alone"
_DERIVED = "what is derived from equal fields is equal"
_STRICT = "the lengths have been checked"
_REMEMBERED = "how many shapes are remembered costs time and changes no answer"
_KERNEL = "the kernel and the formula give the same numbers"
_ROUNDS = "log(1 + e^x) rounds to x from 37 on"
_EITHER_WAY = "rows and PyTorch's kernels give the same numbers"
_LAYOUT = "a memory format changes no number"
_ZERO = "0 is refused either way"
_COMMUTES = "factors may change places"
_EMPTY = "without entries, nothing is there to differ"

EQUIVALENT: dict[str, str] = {
    "checks.as_axis:compare:1": _ZERO,
    "checks.as_axis:off-by-one:1": _ZERO,
    "gradients.ValueAndGrad._of:drop-argument:2": "the default",
    "gradients.contribution:sibling:1": "times a share of 0",
    "gradients.contribution:sibling:2": "times a share of 0",
    "layer.Layer._admit:off-by-one:3": _REMEMBERED,
    "layer.Layer._admit:off-by-one:4": _REMEMBERED,
    "param._shapes:drop-call:1": _TUPLE,
    "param.first_tensor:condition:1": "what is no tensor is refused where it is compared",
    "running._as_promised:drop-call:1": _TUPLE,
    "running.check:drop-call:1": _TUPLE,
    "param.draw:off-by-one:1": "the first keys of a split are the same however many there are",
    "param.size_that_fits:drop-call:1": "no two of the sizes tried fit at once",
    "layers.activations.LogSigmoid._value:off-by-one:2": _ROUNDS,
    "layers.activations.LogSigmoid._slope:off-by-one:2": _ROUNDS,
    "layers.activations.PReLU._fwd:condition:2": _KERNEL,
    "layers.activations.PReLU._fwd:condition:1": "a warning of PyTorch's own",
    "layers.activations.PReLU._bwd:drop-need:2": _NOT_NEEDED,
    "layers.activations.PReLU._bwd:drop-need:5": _NOT_NEEDED,
    "layers.activations.SiLU._slope:condition:2": _KERNEL,
    "layers.attention.MultiheadAttention._bwd:swap-elements:1": "a sum over axes in any order",
    "layers.attention.MultiheadAttention._scale:off-by-one:4": "all weights are dropped",
    "layers.conv:drop-argument:1": "the bound of a type variable is for type checkers",
    "layers.conv.Convolution:drop-argument:2": _REPR,
    "layers.conv.Convolution:drop-argument:3": _DERIVED,
    "layers.conv.Convolution:flip-flag:3": _REPR,
    "layers.conv.Convolution:flip-flag:4": _DERIVED,
    "layers.conv.Convolution._layout:drop-term:2": _LAYOUT,
    "layers.conv.kernel_gradients:condition:2": _NOT_NEEDED,
    "layers.conv_transpose.ConvTranspose:drop-argument:2": _REPR,
    "layers.conv_transpose.ConvTranspose:drop-argument:3": _DERIVED,
    "layers.conv_transpose.ConvTranspose:flip-flag:3": _REPR,
    "layers.conv_transpose.ConvTranspose:flip-flag:4": _DERIVED,
    "layers.conv_transpose.ConvTranspose.__post_init__:drop-argument:1": _STRICT,
    "layers.conv_transpose.ConvTranspose.__post_init__:flip-flag:1": _STRICT,
    "layers.conv_transpose.ConvTranspose._out_shape:drop-argument:1": _STRICT,
    "layers.conv_transpose.ConvTranspose._out_shape:flip-flag:1": _STRICT,
    "layers.conv_transpose.ConvTranspose._out_shape:swap-elements:3": "both sides are alike",
    "layers.linear.Linear._bwd_each:drop-need:1": _NOT_NEEDED,
    "layers.linear.Linear._bwd_each:drop-need:2": _NOT_NEEDED,
    "layers.pixel_shuffle._shuffle:drop-term:1": _KERNEL,
    "layers.pixel_shuffle._shuffle:drop-term:2": _KERNEL,
    "layers.pixel_shuffle._shuffle:condition:1": _KERNEL,
    "layers.pixel_shuffle._shuffle:condition:2": _KERNEL,
    "layers.pixel_shuffle._shuffle:compare:1": _KERNEL,
    "layers.pixel_shuffle._shuffle:compare:2": _KERNEL,
    "layers.pixel_shuffle._shuffle:off-by-one:1": _KERNEL,
    "layers.pixel_shuffle._shuffle:off-by-one:2": _KERNEL,
    "layers.pixel_shuffle._copy:drop-argument:1": "flatten copies what is in another order",
    "layers.normalization._gradients:condition:4": _NOT_NEEDED,
    "layers.pooling.MaxPool:drop-argument:2": _REPR,
    "layers.pooling.MaxPool:drop-argument:3": _DERIVED,
    "layers.pooling.MaxPool:flip-flag:3": _REPR,
    "layers.pooling.MaxPool:flip-flag:4": _DERIVED,
    "layers.pooling.MaxPool._out_shape:drop-call:2": "a list of sizes is read like a tuple",
    "layers.pooling.AvgPool:drop-argument:2": _REPR,
    "layers.pooling.AvgPool:drop-argument:3": _DERIVED,
    "layers.pooling.AvgPool:flip-flag:4": _REPR,
    "layers.pooling.AvgPool:flip-flag:5": _DERIVED,
    "layers.upsample.Upsample2d._bwd:sibling:1": "x is empty where grad is",
    "layers.upsample.UpsampleConv2d:drop-argument:5": _REPR,
    "layers.upsample.UpsampleConv2d._bwd:condition:1": "both methods give the same numbers",
    "ops.conv_transpose.gradients:flip-flag:2": "what is not needed is thrown away",
    "ops.counter._random:drop-term:8": "what is drawn beyond the size is cut off",
    "ops.counter.bernoulli:drop-term:1": "for p = 0 no int32 is below the bound",
    "ops.normalization._dense:drop-call:1": "kernels mind such strides in channels_last alone",
    "ops.normalization._has_few:condition:1": _EITHER_WAY,
    "ops.normalization._has_few:condition:2": _EITHER_WAY,
    "ops.normalization._has_few:drop-term:2": _EITHER_WAY,
    "ops.normalization._has_few:compare:2": _EITHER_WAY,
    "ops.normalization._has_few:off-by-one:1": _EITHER_WAY,
    "ops.normalization._has_few:off-by-one:2": _EITHER_WAY,
    "ops.normalization._has_few:drop-term:3": _EITHER_WAY,
    "ops.normalization._has_few:drop-term:4": _EITHER_WAY,
    "ops.normalization._has_few:flip-sign:1": _EITHER_WAY,
    "ops.normalization.group_norm_gradients:condition:4": _EITHER_WAY,
    "ops.normalization.group_norm_gradients:drop-term:3": _NOT_NEEDED,
    "ops.normalization.group_norm_gradients:swap-elements:4": _EMPTY,
    "ops.normalization.group_norm_gradients:sibling:2": _EMPTY,
    "ops.normalization.group_norm_gradients:drop-call:1": _EMPTY,
    "ops.normalization._group_norm_by_channels:swap-arguments:2": _COMMUTES,
    "ops.normalization._group_norm_gradients_by_channels:swap-arguments:2": _COMMUTES,
    "ops.normalization._group_norm_gradients_by_channels:condition:1": _NOT_NEEDED,
    "ops.normalization.batch_norm:off-by-one:2": "the kernel reads the first C of the ones",
    "ops.stacking.stack:drop-call:1": "torch.stack takes a list like a tuple",
    "combinators.branches.Branches._fresh:off-by-one:1": _IN_PLACE,
    "combinators.branches.Branches._bwd:drop-need:2": _COPY,
    "combinators.branches.Branches._bwd:drop-need:4": "run_bwd asks the same",
    "combinators.several.Several._pairs:flip-flag:1": _STRICT,
    "combinators.sequential.Sequential:drop-argument:2": _REPR,
    "combinators.sequential.Sequential._as_promised:drop-call:2": _TUPLE,
    "combinators.sequential.Sequential._as_promised:condition:1": "a check that repeats itself",
    "combinators.turns.Turns._bwd:drop-need:2": _COPY,
    "combinators.sequential.Sequential._bwd:condition:2": _COPY,
    "combinators.sequential.Sequential._first_to_learn:drop-term:2": "never without layers",
}
