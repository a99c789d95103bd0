#include "kernels/cuda/mma/forward.cuh"

namespace eva_attn::cuda::mma {

template struct Forward<__half>;

} // namespace eva_attn::cuda::mma
