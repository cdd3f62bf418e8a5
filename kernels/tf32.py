"""fp32 products on tensor cores, of TF32 halves whose products do not wait for each other."""

import triton
import triton.language as tl


@triton.jit
def _rounded_to_tf32(x):
    """fp32 with 10 explicit bits of mantissa, halves away from zero; a NaN stays one."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    # 0x7fffffff, the device's own NaN, would pass into the sign and be -0
    return tl.where(x == x, rounded, x)


@triton.jit
def product_3xtf32(x, y):
    """x y in fp32 from the high and low halves of both; the product of the low ones is dropped.

    As `input_precision="tf32x3"`, which adds the three up in one accumulator of the tensor cores,
    each instruction waiting for the one before. `max_num_imprecise_acc` keeps the compiler from
    joining them again.
    """
    x_high = _rounded_to_tf32(x)
    y_high = _rounded_to_tf32(y)
    x_low = _rounded_to_tf32(x - x_high)
    y_low = _rounded_to_tf32(y - y_high)
    K: tl.constexpr = x.shape[1]
    low_high = tl.dot(x_low, y_high, input_precision="tf32", max_num_imprecise_acc=K)
    high_low = tl.dot(x_high, y_low, input_precision="tf32", max_num_imprecise_acc=K)
    high_high = tl.dot(x_high, y_high, input_precision="tf32", max_num_imprecise_acc=K)
    return high_high + (low_high + high_low)


@triton.jit
def product_2xtf32(x, y):
    """x y of an x in 16 bits, which is a TF32 number as it is, and an fp32 y."""
    K: tl.constexpr = x.shape[1]
    y_high = _rounded_to_tf32(y)
    y_low = _rounded_to_tf32(y - y_high)
    x = x.to(tl.float32)
    low = tl.dot(x, y_low, input_precision="tf32", max_num_imprecise_acc=K)
    return tl.dot(x, y_high, input_precision="tf32", max_num_imprecise_acc=K) + low
