// The kernels that write gradients of float32 logits as bfloat16 or float16, for GEMMs of those
// types.
#include "launch.cuh"

TIGHTROPE_INSTANTIATE_GRADIENTS(float, bf16)
TIGHTROPE_INSTANTIATE_GRADIENTS(float, fp16)
