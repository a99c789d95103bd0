#include "kernels/cuda/simt/window_attention.cuh"

namespace eva_attn::cuda::simt {

template struct Kernels<__half>;

} // namespace eva_attn::cuda::simt
