#include "kernels/cuda/launch.h"

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/simt/kernels.h"
#include "kernels/cuda/simt/warp.cuh"

namespace eva_attn::cuda {
namespace {

// A box (y0, y1, x0, x1) for each chunk, one a warp.
__global__ void __launch_bounds__(simt::kThreads)
    chunk_extents_kernel(const Geometry g, int64_t batch, const bool* mask, int32_t* extents) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * simt::kWarps + simt::warp();
    if (row >= batch * g.num_chunks()) return;
    const Box box = g.chunk_box(row % g.num_chunks());
    int32_t y0 = INT32_MAX, y1 = 0, x0 = INT32_MAX, x1 = 0;
    const int width = static_cast<int>(box.width()), count = static_cast<int>(box.height()) * width;
    for (int m = simt::lane(); m < count; m += simt::kLanes) {
        const auto y = static_cast<int32_t>(box.y0) + m / width, x = static_cast<int32_t>(box.x0) + m % width;
        if (simt::is_padding(mask, g, row / g.num_chunks(), g.token(y, x))) continue;
        y0 = min(y0, y), y1 = max(y1, y + 1);
        x0 = min(x0, x), x1 = max(x1, x + 1);
    }
    y0 = __reduce_min_sync(~0u, y0), y1 = __reduce_max_sync(~0u, y1);
    x0 = __reduce_min_sync(~0u, x0), x1 = __reduce_max_sync(~0u, x1);
    if (simt::lane() == 0) {
        int32_t* const out = extents + row * 4;
        out[0] = y0, out[1] = y1, out[2] = x0, out[3] = x1;
    }
}

// Of numbers that lie side by side, one a lane; the warps of a block share the summands.
constexpr int kSumWarps = 16, kSumUnroll = 8;
constexpr int kSumThreads = kSumWarps * simt::kLanes;

// The sum of term(0) .. term(count - 1), always in the same order, for the first warp.
template <class T, class Term>
__device__ T sum_terms(int count, const Term& term) {
    __shared__ T sums[kSumWarps][simt::kLanes];
    T sum = 0;
#pragma unroll 1
    for (int first = simt::warp(); first < count; first += kSumUnroll * kSumWarps) {
        T terms[kSumUnroll]; // all of them under way before the first is added
#pragma unroll
        for (int u = 0; u < kSumUnroll; ++u) {
            const int i = first + u * kSumWarps;
            terms[u] = i < count ? term(i) : T(0);
        }
#pragma unroll
        for (int u = 0; u < kSumUnroll; ++u) sum += terms[u];
    }
    sums[simt::warp()][simt::lane()] = sum;
    __syncthreads();
    if (simt::warp() != 0) return 0;
#pragma unroll
    for (int warp = 1; warp < kSumWarps; ++warp) sum += sums[warp][simt::lane()];
    return sum;
}

template <class T>
__device__ void store_as(DType dtype, void* data, int64_t at, T x) {
    switch (dtype) {
    case DType::kFloat:
        return simt::store(static_cast<float*>(data) + at, static_cast<float>(x));
    case DType::kDouble:
        return simt::store(static_cast<double*>(data) + at, static_cast<double>(x));
    case DType::kBFloat16:
        return simt::store(static_cast<__nv_bfloat16*>(data) + at, static_cast<float>(x));
    case DType::kHalf:
        return simt::store(static_cast<__half*>(data) + at, static_cast<float>(x));
    }
}

template <class T>
__global__ void __launch_bounds__(kSumThreads, 3)
    sum_projection_gradients_kernel(const __grid_constant__ ProjectionGradients p) {
    wait_for_dependencies();
    const int head_dim = static_cast<int>(p.head_dim), size = (head_dim + 3) * head_dim;
    const int i = static_cast<int>(blockIdx.x) * simt::kLanes + simt::lane();
    const int projection = i / size, row = i % size / head_dim, column = i % head_dim;
    const ProjectionGradients::Parameter* const parameters[] = {p.bias, p.norm_weight, p.norm_bias};
    const bool inside = projection < p.projections;
    const T* const terms = static_cast<const T*>(p.terms) + i;
    const T sum = sum_terms<T>(inside ? static_cast<int>(p.pieces) : 0,
                               [&](int piece) { return terms[int64_t{piece} * 2 * size]; });
    if (simt::warp() != 0 || !inside) return;
    const auto [data, dtype] = row < head_dim ? p.weight[projection] : parameters[row - head_dim][projection];
    if (data) store_as(dtype, data, row < head_dim ? row * head_dim + column : column, sum);
}

template <class T>
__global__ void __launch_bounds__(kSumThreads, 3)
    sum_bias_gradient_kernel(const __grid_constant__ BiasGradient p) {
    wait_for_dependencies();
    const int64_t blocks = detail::ceil_div(p.entries, simt::kLanes), head = blockIdx.x / blocks;
    const int64_t i = (blockIdx.x - head * blocks) * simt::kLanes + simt::lane();
    const bool inside = i < p.entries;
    const T* const terms = static_cast<const T*>(p.terms) + head * p.pieces * p.entries + i;
    const T sum = sum_terms<T>(inside ? static_cast<int>(p.pieces) : 0,
                               [&](int piece) { return terms[piece * p.entries]; });
    if (simt::warp() == 0 && inside) store_as(p.dtype, p.data, head * p.entries + i, sum);
}

// The kernels of a dtype, as an argument of `body`.
template <class Body>
void dispatch(DType dtype, Body body) {
    switch (dtype) {
    case DType::kFloat:
        return body(simt::Kernels<float>());
    case DType::kDouble:
        return body(simt::Kernels<double>());
    case DType::kBFloat16:
        return body(simt::Kernels<__nv_bfloat16>());
    case DType::kHalf:
        return body(simt::Kernels<__half>());
    }
}

} // namespace

void chunk_extents(const Geometry& geometry, int64_t batch, const bool* key_padding_mask, int32_t* extents,
                   cudaStream_t stream) {
    simt::launch(chunk_extents_kernel, detail::ceil_div(batch * geometry.num_chunks(), simt::kWarps), 0,
                 stream, geometry, batch, key_padding_mask, extents);
}

void sum_projection_gradients(DType accumulation, const ProjectionGradients& p, cudaStream_t stream) {
    const int64_t blocks = detail::ceil_div(p.projections * (p.head_dim + 3) * p.head_dim, simt::kLanes);
    const auto kernel = accumulation == DType::kDouble ? sum_projection_gradients_kernel<double>
                                                       : sum_projection_gradients_kernel<float>;
    launch_dependent(kernel, blocks, kSumThreads, 0, stream, p);
}

void sum_bias_gradient(DType accumulation, const BiasGradient& p, cudaStream_t stream) {
    const int64_t blocks = p.heads * detail::ceil_div(p.entries, simt::kLanes);
    if (blocks == 0) return;
    const auto kernel =
        accumulation == DType::kDouble ? sum_bias_gradient_kernel<double> : sum_bias_gradient_kernel<float>;
    launch_dependent(kernel, blocks, kSumThreads, 0, stream, p);
}

namespace simt {

void chunk_summary_fwd(DType dtype, const SummaryParams& p, cudaStream_t stream) {
    dispatch(dtype, [&](auto kernels) { kernels.chunk_summary_fwd(p, stream); });
}
void chunk_summary_bwd(DType dtype, const SummaryParams& p, cudaStream_t stream) {
    dispatch(dtype, [&](auto kernels) { kernels.chunk_summary_bwd(p, stream); });
}
void chunk_terms(DType dtype, const TermsParams& p, cudaStream_t stream) {
    dispatch(dtype, [&](auto kernels) { kernels.chunk_terms(p, stream); });
}
void window_attention_fwd(DType dtype, const AttentionParams& p, cudaStream_t stream) {
    dispatch(dtype, [&](auto kernels) { kernels.window_attention_fwd(p, stream); });
}
void window_attention_bwd_global(DType dtype, const AttentionParams& p, cudaStream_t stream) {
    dispatch(dtype, [&](auto kernels) { kernels.window_attention_bwd_global(p, stream); });
}
void window_attention_bwd(DType dtype, const AttentionParams& p, cudaStream_t stream) {
    dispatch(dtype, [&](auto kernels) { kernels.window_attention_bwd(p, stream); });
}

// All of the shape alone, so that sums are the same on every device.
int64_t global_pieces(DType, const AttentionParams& p) {
    constexpr int64_t kBlocks = 1024, kTileRows = 16, kLeastTokens = 128;
    const Geometry& g = p.shape.geometry;
    const int64_t tiles = detail::ceil_div(p.num_landmarks + g.num_prefix_tokens, kTileRows);
    const int64_t wanted = detail::ceil_div(kBlocks, detail::max(p.shape.batch * p.shape.heads * tiles, 1));
    return detail::max(detail::min(wanted, g.num_tokens() / kLeastTokens), 1);
}
int64_t bias_pieces(DType, const AttentionParams& p) {
    constexpr int64_t kBlocks = 1024, kElements = int64_t{1} << 24;
    const Geometry& g = p.shape.geometry;
    const int64_t heads = detail::max(p.shape.batch * p.shape.heads, 1);
    const int64_t wanted = detail::min(detail::ceil_div(kBlocks, heads),
                                       kElements / (heads * kWarps * g.bias_height * g.bias_width));
    return kWarps * detail::max(detail::min(wanted, g.num_windows()), 1);
}
int64_t projection_pieces(DType, const SummaryParams& p) {
    constexpr int64_t kMost = 128, kLeastChunks = 64;
    const int64_t chunks = p.shape.batch * p.shape.heads * p.shape.geometry.num_chunks();
    return detail::max(detail::min(chunks / kLeastChunks, kMost), 1);
}

} // namespace simt
} // namespace eva_attn::cuda
