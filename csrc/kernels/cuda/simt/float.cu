#include "kernels/cuda/simt/window_attention.cuh"

namespace eva_attn::cuda::simt {

template struct Kernels<float>;

} // namespace eva_attn::cuda::simt
