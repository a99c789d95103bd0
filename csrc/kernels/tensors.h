// What the kernels of every device are told about tensors.
#pragma once

#include <cstdint>

#include "kernels/geometry.h"

namespace eva_attn {

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

// A [B, H, N, D] tensor; strides in elements.
struct Rows {
    void* data;
    int64_t batch_stride, head_stride, token_stride, dim_stride;
};

struct Shape {
    int64_t batch, heads, head_dim;
    Geometry geometry;
};

// Chunks of at most as many 16-bit tokens, of at most as many channels, have kernels of their own on CUDA.
// From forward to backward these keep one mean alone, rounded.
constexpr int kFewMembers = 4, kFewMembersHeadDim = 64;
inline bool has_few_members(const Shape& shape) {
    const Geometry& g = shape.geometry;
    return g.chunk_height * g.chunk_width <= kFewMembers && shape.head_dim <= kFewMembersHeadDim;
}

} // namespace eva_attn
