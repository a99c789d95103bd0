#include <cuda_fp16.h>

#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma/backward.h"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/window_attention_bwd_prefix.cuh"

namespace eva_attn::cuda::mma {

const char* supports_bwd(DType dtype, const SummaryParams& p) {
    if (const char* reason = supports(dtype, p)) return reason;
    const Geometry& g = p.shape.geometry;
    if (g.chunk_overlap_y > 0 || g.chunk_overlap_x > 0)
        return "tensor cores are used in the backward pass where chunks do not overlap";
    if (p.shape.batch * p.shape.heads * g.num_chunks() > INT_MAX)
        return "tensor cores are used in the backward pass for at most 2^31 chunks";
    for (const Projection* a : {&p.key_projection, &p.query_projection})
        if (p.has_projection && reinterpret_cast<uintptr_t>(a->weight) % 16 != 0)
            return "tensor cores need projection weights that start at a multiple of 16 bytes";
    return nullptr;
}

const char* supports_bwd(DType dtype, const AttentionParams& p) {
    if (const char* reason = supports(dtype, p)) return reason;
    const Geometry& g = p.shape.geometry;
    AttentionParams gradients = p; // its rows are laid out as the forward pass asks of its own
    gradients.query = p.grad_output;
    if (p.grad_output.data && supports(dtype, gradients))
        return "tensor cores need a gradient of the output whose rows are contiguous and 16-byte aligned";
    if (g.chunk_overlap_y > 0 || g.chunk_overlap_x > 0)
        return "tensor cores are used in the backward pass where chunks do not overlap";
    static_assert(kMaxPrefixTokens == 8);
    if (g.num_prefix_tokens > kMaxPrefixTokens)
        return "tensor cores are used in the backward pass for at most 8 prefix tokens";
    if (p.relative_bias && !is_one_block(g))
        return "tensor cores are used in the backward pass of a relative bias for windows of at most 64 "
               "tokens "
               "that do not overlap";
    if (is_one_block(g) &&
        Backward<__half>::shared_bytes(p) > device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>())
        return "the tensor-core backward pass needs more shared memory for head dims above 64 than the "
               "device has";
    return nullptr;
}

} // namespace eva_attn::cuda::mma
