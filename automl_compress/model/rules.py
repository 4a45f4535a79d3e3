"""How channels pass through each ATen operator.

A rule takes the walk and a node and returns the labels of the node's output, or of each of its outputs; it ties the
channels that the operator couples and freezes those that it mixes in a way that a cut would change. Operators without a
rule freeze what flows in. In-place forms share the rule of the plain form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from automl_compress.model import contractions, pieces, shapes, statistics
from automl_compress.model.labels import Labels

if TYPE_CHECKING:
    from automl_compress.model.walk import Walk

Rule = Callable[["Walk", Node], Any]


def pointwise(walk: Walk, node: Node) -> Labels:
    """Every tensor argument is broadcast against the others; channels at the same index are one channel."""
    operands = [(operand, walk.labels(operand)) for operand in walk.tensors(node)]
    return contractions.broadcast(walk, node, operands, walk.shape(node))


def extremum(walk: Walk, node: Node) -> Any:
    """max and min: of two tensors, or over a dimension."""
    return pointwise(walk, node) if len(walk.tensors(node)) > 1 else statistics.reduce(walk, node)


_POINTWISE = """relu gelu silu hardswish hardsigmoid sigmoid tanh leaky_relu elu softplus mish hardtanh relu6 clamp
clamp_min clamp_max abs neg exp exp2 sqrt rsqrt square log log2 log1p expm1 pow reciprocal dropout feature_dropout
alpha_dropout native_dropout add sub mul div maximum minimum where rsub selu celu logsigmoid softsign erf sin cos sign
floor ceil round trunc remainder fmod addcmul addcdiv lerp masked_fill threshold softshrink hardshrink tanhshrink eq ne
lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not __and__ __or__ isnan isinf nan_to_num
rrelu atan atan2 tan sinh cosh asinh acosh floor_divide log_sigmoid fill zeros_like ones_like full_like rand_like
randn_like empty_like bernoulli multiply divide subtract true_divide square_ detach_ __rsub__ arctan xlogy sinc logit
hypot heaviside copysign zero copy"""
_SAME = """clone contiguous detach alias to _to_copy type_as lift_fresh_copy lift_fresh float half double view_as_real
real requires_grad resolve_conj resolve_neg positive _conj"""
_SPATIAL = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest_exact1d _upsample_nearest_exact2d
_adaptive_avg_pool2d _adaptive_avg_pool3d grid_sampler_2d"""
_REDUCE = "mean sum amax amin var std var_mean std_mean prod logsumexp argmax argmin median all any norm"
_ALONG = "softmax log_softmax _softmax _log_softmax softmin cumsum cumprod logcumsumexp"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE.split(), pointwise),
    **dict.fromkeys(_SAME.split(), shapes.same),
    **dict.fromkeys(_SPATIAL.split(), statistics.spatial),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool1d_with_indices"), statistics.pairs),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), contractions.convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), contractions.transposed_convolution),
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot", "addmm", "baddbmm"), contractions.product),
    "linear": contractions.linear,
    "einsum": contractions.einsum,
    "scaled_dot_product_attention": contractions.attention,
    **dict.fromkeys(_REDUCE.split(), statistics.reduce),
    **dict.fromkeys(("max", "min"), extremum),
    "linalg_vector_norm": statistics.vector_norm,
    **dict.fromkeys(_ALONG.split(), statistics.along_dim),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), statistics.batch_norm),
    "instance_norm": statistics.batch_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), statistics.layer_norm),
    "group_norm": statistics.group_norm,
    "prelu": statistics.prelu,
    **dict.fromkeys(("view", "reshape", "flatten", "_unsafe_view", "unflatten", "_reshape_alias"), shapes.reshape),
    **dict.fromkeys(("cat", "concat", "concatenate"), pieces.concatenate),
    "stack": pieces.stack,
    "permute": shapes.permute,
    **dict.fromkeys(("transpose", "t", "mT", "numpy_T", "swapaxes", "swapdims"), shapes.transpose),
    **dict.fromkeys(("movedim", "moveaxis"), shapes.move_dims),
    "unsqueeze": shapes.unsqueeze,
    "squeeze": shapes.squeeze,
    **dict.fromkeys(("expand", "broadcast_to"), shapes.expand),
    **dict.fromkeys(("view_as", "reshape_as", "expand_as"), shapes.tie_second),
    **dict.fromkeys(("repeat", "tile"), shapes.repeat),
    "repeat_interleave": shapes.repeat_interleave,
    **dict.fromkeys(("slice", "narrow"), pieces.slice_range),
    "select": pieces.select,
    "unbind": pieces.unbind,
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "tensor_split"), pieces.split),
    "getitem": pieces.get_item,
    "glu": pieces.gated_halves,
    **dict.fromkeys(("pad", "constant_pad_nd"), pieces.pad),
    "flip": shapes.flip,
    "roll": shapes.roll,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), shapes.shuffle_channels),
    **dict.fromkeys(("pixel_shuffle", "col2im"), shapes.pixels_to_positions),
    **dict.fromkeys(("pixel_unshuffle", "im2col"), shapes.positions_to_pixels),
    "index": pieces.index,
    "index_select": pieces.index_select,
    "embedding": pieces.embedding,
    **dict.fromkeys(
        ("new_zeros", "new_ones", "new_full", "zeros", "ones", "full", "new_empty", "empty"), shapes.create
    ),
    **dict.fromkeys(("arange", "linspace", "eye", "scalar_tensor"), shapes.plain),
}
