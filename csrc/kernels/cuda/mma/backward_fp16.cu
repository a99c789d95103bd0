#include "kernels/cuda/mma/backward.cuh"

namespace eva_attn::cuda::mma {

template struct Backward<__half>;

} // namespace eva_attn::cuda::mma
