#include "kernels/cuda/mma/forward.cuh"

namespace eva_attn::cuda::mma {

template struct Forward<__nv_bfloat16>;

} // namespace eva_attn::cuda::mma
