#include "kernels/cuda/simt/window_attention.cuh"

namespace eva_attn::cuda::simt {

template struct Kernels<double>;

} // namespace eva_attn::cuda::simt
