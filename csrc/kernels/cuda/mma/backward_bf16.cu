#include "kernels/cuda/mma/backward.cuh"

namespace eva_attn::cuda::mma {

template struct Backward<__nv_bfloat16>;

} // namespace eva_attn::cuda::mma
