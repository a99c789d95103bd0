#include "kernels/cuda/simt/window_attention.cuh"

namespace eva_attn::cuda::simt {

template struct Kernels<__nv_bfloat16>;

} // namespace eva_attn::cuda::simt
