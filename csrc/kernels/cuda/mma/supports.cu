#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma/windows.cuh"

namespace eva_attn::cuda::mma {
namespace {

constexpr int64_t kMaxTileHeadDim = 128;
constexpr int kMaxTableSize = 1 << 13;

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool aligned(const Rows& rows, const Shape& shape) {
    const auto whole = [](int64_t size, int64_t stride) { return size == 1 || stride % 8 == 0; };
    return aligned(rows.data) && rows.dim_stride == 1 && rows.token_stride <= INT_MAX / 2 &&
           whole(shape.batch, rows.batch_stride) && whole(shape.heads, rows.head_stride) &&
           whole(shape.geometry.num_tokens(), rows.token_stride);
}

bool aligned(const Projection& projection) {
    return aligned(projection.weight) && aligned(projection.bias) && aligned(projection.norm_weight) &&
           aligned(projection.norm_bias);
}

// Tokens, chunks and CTAs are numbered by int.
bool countable(const Shape& shape) {
    const Geometry& g = shape.geometry;
    const int64_t sequences = shape.batch * shape.heads;
    return g.num_tokens() <= INT_MAX / 2 && sequences <= INT_MAX / kMaxSlices &&
           sequences * g.num_chunks() <= INT_MAX;
}

const char* supports(DType dtype, const Shape& shape) {
    if (dtype != DType::kBFloat16 && dtype != DType::kHalf)
        return "tensor cores are used for bfloat16 and float16";
    if (shape.head_dim % 8 != 0 || shape.head_dim > kMaxTileHeadDim)
        return "tensor cores are used for head dims that are multiples of 8 up to 128";
    if (!countable(shape)) return "tensor cores are used for fewer than 2^30 tokens and 2^31 chunks";
    return nullptr;
}

constexpr const char* kUnaligned =
    "tensor cores need tensors whose last dim is contiguous and whose rows start at multiples of 16 bytes";

} // namespace

const char* supports(DType dtype, const SummaryParams& p) {
    if (const char* reason = supports(dtype, p.shape)) return reason;
    const Geometry& g = p.shape.geometry;
    for (const Rows& rows : {p.query, p.key, p.value})
        if (!aligned(rows, p.shape)) return kUnaligned;
    const int64_t members =
        (g.chunk_height + 2 * g.chunk_overlap_y) * (g.chunk_width + 2 * g.chunk_overlap_x);
    if (!aligned(p.noise) || !aligned(p.key_projection) || !aligned(p.query_projection))
        return "tensor cores need noise and projections that start at multiples of 16 bytes";
    if (p.has_projection && p.key_projection.dtype == DType::kDouble)
        return "tensor cores need projections of at most float32";
    if (p.has_query_projection && p.query_projection.dtype != p.key_projection.dtype)
        return "tensor cores need both projections in one dtype";
    if (p.tangent) return "tensor cores are not used to make tangents";
    if (members > kMaxBoxTokens) return "tensor cores are used for chunks of fewer than 2^15 tokens";
    return nullptr;
}

const char* supports(DType dtype, const AttentionParams& p) {
    if (const char* reason = supports(dtype, p.shape)) return reason;
    const Geometry& g = p.shape.geometry;
    for (const Rows& rows : {p.query, p.key, p.value, p.output})
        if (!aligned(rows, p.shape)) return kUnaligned;
    if (!aligned(p.landmark_key) || !aligned(p.landmark_value)) return kUnaligned;
    const int64_t keys = (g.window_height + 2 * g.overlap_y) * (g.window_width + 2 * g.overlap_x);
    if (keys > kMaxBoxTokens) return "tensor cores are used for windows of fewer than 2^15 keys";
    if (p.landmark_entropy) return "tensor cores are not used for attention to tangents";
    if (p.scale <= 0) return "tensor cores are used for positive scales";
    if (Windows::of(p).table_size > kMaxTableSize)
        return "tensor cores are used where the window's relative bias fits into shared memory";
    return nullptr;
}

} // namespace eva_attn::cuda::mma
