// Landmarks: the chunks' means, their projections, and the chunks' softmax-weighted sums of values, forward.
//
// Rows are read 16 bytes a lane, kHeadDim / 8 lanes a row; such a group of lanes takes every `parts`-th
// member of a chunk. All arithmetic is in float; products with the projections' weights are as exact as three
// products of bfloat16 halves.
#pragma once

#include <algorithm>

#include "kernels/cuda/mma/projection.cuh"

namespace eva_attn::cuda::mma {

template <int kHeadDim>
struct SummaryFwdTraits {
    static constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
    static constexpr int kLanes = kHeadDim / 8; // of a row
    static constexpr int kGroups = kThreads / kLanes, kGroupsPerWarp = kWarpSize / kLanes;
    static constexpr int kUnroll = 4; // rows that a group has under way of each tensor
    static constexpr int kCtasPerSm = 3;
    static constexpr int kMembersPerPart = 16; // where there are groups enough

    // Sums over the parts in a warp, of keys (then projected) and of queries (then of values).
    using Partial = float[2][kHeadDim];
    using Mean = Tile<__nv_bfloat16, kHeadDim>;
};

// Where the members of chunks lie.
struct ChunkBoxes {
    BoxShape members;
    int chunk_height, chunk_width, columns, count;
    int overlap_y, overlap_x;
    int grid_height, grid_width, num_prefix_tokens;

    static ChunkBoxes of(const Geometry& g) {
        return ChunkBoxes{
            .members =
                BoxShape::of(g.chunk_height + 2 * g.chunk_overlap_y, g.chunk_width + 2 * g.chunk_overlap_x),
            .chunk_height = static_cast<int>(g.chunk_height),
            .chunk_width = static_cast<int>(g.chunk_width),
            .columns = static_cast<int>(g.chunk_columns()),
            .count = static_cast<int>(g.num_chunks()),
            .overlap_y = static_cast<int>(g.chunk_overlap_y),
            .overlap_x = static_cast<int>(g.chunk_overlap_x),
            .grid_height = static_cast<int>(g.grid_height),
            .grid_width = static_cast<int>(g.grid_width),
            .num_prefix_tokens = static_cast<int>(g.num_prefix_tokens),
        };
    }
    __device__ TokenBox box(int chunk) const {
        const int y = static_cast<unsigned>(chunk) / static_cast<unsigned>(columns);
        return TokenBox{
            .shape = members,
            .y0 = y * chunk_height - overlap_y,
            .x0 = (chunk - y * columns) * chunk_width - overlap_x,
            .grid_height = grid_height,
            .grid_width = grid_width,
            .num_prefix_tokens = num_prefix_tokens,
        };
    }
};

struct SummaryFwdPlan {
    ChunkBoxes chunks;
    int parts_log2, members_per_part;
    int kept;          // members of a part whose keys stay in shared memory
    int partials_log2; // of a row
    int num_rows;      // batch * chunks * heads
    int rows_per_cta;

    // Row numbers have the heads fastest, as they lie side by side in memory.
    struct Row {
        int batch, head, chunk;
    };
    __device__ Row row(int index, int heads) const {
        const unsigned row = index, h = heads, c = chunks.count, rest = row / h;
        return Row{.batch = static_cast<int>(rest / c),
                   .head = static_cast<int>(row - rest * h),
                   .chunk = static_cast<int>(rest % c)};
    }
};

// Calls f with a value of the parameters' type.
template <class F>
__device__ inline void with_type(DType dtype, F f) {
    if (dtype == DType::kFloat) return f(float{});
    dtype == DType::kHalf ? f(__half{}) : f(__nv_bfloat16{});
}

// Eight elements of a mean, high and low halves, into the columns where `multiply_weights` looks for them: of
// 16 columns the lane pairs of an operand hold 4 t .. 4 t + 3, so that it reads the weights 4 at a time.
template <int kHeadDim>
__device__ inline void store_mean(Tile<__nv_bfloat16, kHeadDim> high, Tile<__nv_bfloat16, kHeadDim> low,
                                  int row, int column, const Float8& x) {
    const int unit = column / 16 * 2, offset = column / 8 % 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const SplitPair a = split(x.x[2 * half], x.x[2 * half + 1]);
        const SplitPair b = split(x.x[2 * half + 4], x.x[2 * half + 5]);
        *reinterpret_cast<uint2*>(high.unit(row, unit + half) + offset) = uint2{a.high, b.high};
        *reinterpret_cast<uint2*>(low.unit(row, unit + half) + offset) = uint2{a.low, b.low};
    }
}

// partial[i << partials_log2][which] = weight * (high + low)[which] for `rows` means i.
template <int kHeadDim, class W>
__device__ inline void multiply_weights(const W* weight, int head_dim, int rows, int which, int partials_log2,
                                        Tile<__nv_bfloat16, kHeadDim> high, Tile<__nv_bfloat16, kHeadDim> low,
                                        int column, typename SummaryFwdTraits<kHeadDim>::Partial* partial) {
    constexpr int kSteps = kHeadDim / 16;
    const int lane = threadIdx.x % kWarpSize, group = lane / 4, pair = lane % 4 * 2;
    float4 w[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        const int from = 16 * k + 2 * pair;
        w[k] = column + group < head_dim && from < head_dim
                   ? load4(weight + (column + group) * head_dim + from)
                   : float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
    SplitPair b[kSteps][2];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        b[k][0] = split(w[k].x, w[k].y);
        b[k][1] = split(w[k].z, w[k].w);
    }
#pragma unroll 1
    for (int row = 0; row < rows; row += 16) {
        const Tile<__nv_bfloat16, kHeadDim> row_high{high.data + row * kHeadDim},
            row_low{low.data + row * kHeadDim};
        float c[4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            uint32_t a_high[4], a_low[4];
            row_high.load_a(a_high, 0, 2 * k);
            row_low.load_a(a_low, 0, 2 * k);
            multiply_add<__nv_bfloat16>(c, a_low, b[k][0].high, b[k][1].high);
            multiply_add<__nv_bfloat16>(c, a_high, b[k][0].low, b[k][1].low);
            multiply_add<__nv_bfloat16>(c, a_high, b[k][0].high, b[k][1].high);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (const int i = row + group + 8 * r; i < rows)
                *reinterpret_cast<float2*>(&partial[i << partials_log2][which][column + pair]) =
                    float2{c[2 * r], c[2 * r + 1]};
    }
}

// Adds the Linear's bias and applies the LayerNorm to a row, of which each lane of a group holds eight
// columns.
template <int kHeadDim, class W>
__device__ inline void normalise(const Projection& projection, float eps, int head_dim, int column,
                                 Float8& x) {
    constexpr int kLanes = SummaryFwdTraits<kHeadDim>::kLanes;
    const bool inside = column < head_dim;
    const auto vector = [&](const void* data, float otherwise) {
        Float8 result;
#pragma unroll
        for (int i = 0; i < 8; i += 4)
            *reinterpret_cast<float4*>(result.x + i) =
                data && inside ? load4(static_cast<const W*>(data) + column + i)
                               : float4{otherwise, otherwise, otherwise, otherwise};
        return result;
    };
    const Float8 bias = vector(projection.bias, 0.0f);
    const Float8 norm_weight = vector(projection.norm_weight, 1.0f),
                 norm_bias = vector(projection.norm_bias, 0.0f);
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x.x[i] += bias.x[i];
    if (!projection.norm_weight) return;
    const float reciprocal_dim = 1.0f / static_cast<float>(head_dim);
    const float center = lanes_sum<kLanes>(sum) * reciprocal_dim;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x.x[i] = inside ? x.x[i] - center : 0.0f;
        squares += x.x[i] * x.x[i];
    }
    const float scale = rsqrtf(lanes_sum<kLanes>(squares) * reciprocal_dim + eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) x.x[i] = x.x[i] * scale * norm_weight.x[i] + norm_bias.x[i];
}

template <class S, int kHeadDim>
__global__ void __launch_bounds__(SummaryFwdTraits<kHeadDim>::kThreads,
                                  SummaryFwdTraits<kHeadDim>::kCtasPerSm)
    chunk_summary_fwd_kernel(const __grid_constant__ SummaryParams p,
                             const __grid_constant__ SummaryFwdPlan plan) {
    using Traits = SummaryFwdTraits<kHeadDim>;
    using Mean = typename Traits::Mean;
    constexpr int kLanes = Traits::kLanes, kUnroll = Traits::kUnroll;

    wait_for_dependencies();
    const int parts = 1 << plan.parts_log2, partials = 1 << plan.partials_log2;
    const int rows_per_cta = plan.rows_per_cta, tile_rows = (rows_per_cta + 15) / 16 * 16;
    extern __shared__ __align__(128) char shared_bytes[];
    auto* mean_data = reinterpret_cast<__nv_bfloat16*>(shared_bytes);
    const auto mean_tile = [&](int which, int half) {
        return Mean{mean_data + (which * 2 + half) * tile_rows * kHeadDim};
    };
    auto* partial = reinterpret_cast<typename Traits::Partial*>(mean_data + 4 * tile_rows * kHeadDim);
    const int num_partials = rows_per_cta << plan.partials_log2;
    auto* partial_count = reinterpret_cast<int*>(partial + num_partials);
    auto* partial_maximum = reinterpret_cast<float*>(partial_count + Traits::kGroups);
    auto* partial_weight = partial_maximum + Traits::kGroups;
    auto* kept_key = reinterpret_cast<uint4*>(partial_weight + Traits::kGroups) + threadIdx.x;

    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const bool has_mu = !p.has_projection || p.has_query_projection;
    const int group = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 8;
    const bool inside = column < head_dim;
    const int first_row = blockIdx.x * rows_per_cta;
    const int rows = min(rows_per_cta, plan.num_rows - first_row);

    // This group's members of its chunk.
    const int row = group >> plan.parts_log2, part = group & (parts - 1);
    const auto at = plan.row(min(first_row + row, plan.num_rows - 1), heads);
    const TokenBox box = plan.chunks.box(at.chunk);
    const bool* mask =
        p.key_padding_mask ? p.key_padding_mask + at.batch * p.shape.geometry.num_tokens() : nullptr;
    const int members = row < rows ? plan.chunks.members.size() : 0, first_token = box.first_token();
    // The tokens of this group's members `first` onward, negative where there are none.
    const auto find_tokens = [&](int (&token)[kUnroll], int first) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int member = part + ((first + u) << plan.parts_log2);
            const int y = divide(member, plan.chunks.members.width_reciprocal),
                      x = member - y * plan.chunks.members.width;
            const bool valid =
                member < members &&
                static_cast<unsigned>(box.y0 + y) < static_cast<unsigned>(plan.chunks.grid_height) &&
                static_cast<unsigned>(box.x0 + x) < static_cast<unsigned>(plan.chunks.grid_width);
            token[u] = valid ? first_token + y * plan.chunks.grid_width + x : -1;
        }
        if (!mask) return;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            if (token[u] >= 0 && mask[token[u]]) token[u] = -1;
    };
    struct Column {
        const char* data;
        int stride_bytes;
    };
    const auto column_of = [&](const Rows& rows) {
        return Column{reinterpret_cast<const char*>(head_rows<S>(rows, at.batch, at.head) + column),
                      static_cast<int>(rows.token_stride) * static_cast<int>(sizeof(S))};
    };
    const Column query = column_of(p.query), key = column_of(p.key), value = column_of(p.value);
    const auto load = [&](const Column& from, int token) {
        return load_streaming(from.data + static_cast<int64_t>(token) * from.stride_bytes,
                              token >= 0 && inside);
    };

    Float8 key_sum{}, query_sum{};
    int count = 0;
    for (int first = 0; first < plan.members_per_part; first += kUnroll) {
        int token[kUnroll];
        find_tokens(token, first);
        uint4 k[kUnroll], q[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            count += token[u] >= 0;
            k[u] = load(key, token[u]);
            q[u] = load(query, has_mu ? token[u] : -1);
        }
        if (first < plan.kept) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) kept_key[(first + u) * Traits::kThreads] = k[u];
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Float8 k8 = unpack8<S>(k[u]), q8 = unpack8<S>(q[u]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                key_sum.x[i] += k8.x[i];
                query_sum.x[i] += q8.x[i];
            }
        }
    }
    // Parts of a chunk in one warp are added up at once.
    const int merged = min(parts, Traits::kGroupsPerWarp);
    const int partial_idx = group / merged;
    const bool leads = group % merged == 0 && row < rows;
    for (int offset = kLanes; offset < merged * kLanes; offset *= 2) {
        count += __shfl_xor_sync(0xffffffffu, count, offset);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            key_sum.x[i] += __shfl_xor_sync(0xffffffffu, key_sum.x[i], offset);
            query_sum.x[i] += __shfl_xor_sync(0xffffffffu, query_sum.x[i], offset);
        }
    }
    if (leads) {
        *reinterpret_cast<Float8*>(partial[partial_idx][0] + column) = key_sum;
        *reinterpret_cast<Float8*>(partial[partial_idx][1] + column) = query_sum;
        if (column == 0) partial_count[partial_idx] = count;
    }
    __syncthreads();

    // From here to omega, group i has row i.
    const bool has_row = group < rows;
    const auto own = plan.row(first_row + min(group, rows - 1), heads);
    const int64_t own_row =
        (static_cast<int64_t>(own.batch) * heads + own.head) * plan.chunks.count + own.chunk;
    const int own_partial = min(group, rows - 1) << plan.partials_log2;
    if (has_row) {
        Float8 mean[2] = {};
        int count = 0;
        for (int i = own_partial; i < own_partial + partials; ++i) {
            count += partial_count[i];
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const Float8 term = *reinterpret_cast<const Float8*>(partial[i][which] + column);
#pragma unroll
                for (int d = 0; d < 8; ++d) mean[which].x[d] += term.x[d];
            }
        }
        const float factor = 1.0f / static_cast<float>(p.mean_divisor ? p.mean_divisor : max(count, 1));
#pragma unroll
        for (int which = 0; which < 2; ++which) {
#pragma unroll
            for (int d = 0; d < 8; ++d) mean[which].x[d] *= factor;
            if (p.has_projection) {
                store_mean(mean_tile(which, 0), mean_tile(which, 1), group, column, mean[which]);
            } else {
                *reinterpret_cast<Float8*>(partial[own_partial][which] + column) = mean[which];
            }
            if (!inside || (which == 1 ? !has_mu : p.rounded_mean)) continue;
            void* const saved = which == 0 ? p.key_mean : p.query_mean;
            const int64_t to = own_row * head_dim + column;
            if (p.rounded_mean)
                *reinterpret_cast<uint4*>(static_cast<S*>(saved) + to) = pack8<S>(mean[which]);
            else
                *reinterpret_cast<Float8*>(static_cast<float*>(saved) + to) = mean[which];
        }
    }
    __syncthreads();

    if (p.has_projection) {
        constexpr int kTiles = kHeadDim / 8;
        with_type(p.key_projection.dtype, [&](auto w) {
            for (int tile = threadIdx.x / kWarpSize; tile < (1 + p.has_query_projection) * kTiles;
                 tile += Traits::kWarps) {
                const int which = tile / kTiles;
                const void* weight = which == 0 ? p.key_projection.weight : p.query_projection.weight;
                multiply_weights<kHeadDim>(static_cast<const decltype(w)*>(weight), head_dim, rows, which,
                                           plan.partials_log2, mean_tile(which, 0), mean_tile(which, 1),
                                           tile % kTiles * 8, partial);
            }
        });
        __syncthreads();
    }
    // Whole warps, as `normalise` adds up over lanes.
    if (threadIdx.x / kWarpSize * Traits::kGroupsPerWarp < rows) {
        Float8 landmark[2] = {};
#pragma unroll
        for (int which = 0; which < 2; ++which)
            if (has_row)
                landmark[which] = *reinterpret_cast<const Float8*>(partial[own_partial][which] + column);
        if (p.has_projection)
            with_type(p.key_projection.dtype, [&](auto w) {
                const auto eps = static_cast<float>(p.norm_eps);
                normalise<kHeadDim, decltype(w)>(p.key_projection, eps, head_dim, column, landmark[0]);
                if (p.has_query_projection)
                    normalise<kHeadDim, decltype(w)>(p.query_projection, eps, head_dim, column, landmark[1]);
            });
        if (has_row && inside) {
            const Float8& x = landmark[0];
            const int64_t to = own_row * head_dim + column;
            *reinterpret_cast<uint4*>(static_cast<S*>(p.landmark_key) + to) = pack8<S>(x);
            Float8 omega{};
            if (p.noise) omega = *reinterpret_cast<const Float8*>(static_cast<const float*>(p.noise) + to);
            if (has_mu) {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    omega.x[i] += static_cast<float>(p.mu_scale) * (landmark[1].x[i] + landmark[0].x[i]);
            }
            if (p.omega_rows) *reinterpret_cast<Float8*>(static_cast<float*>(p.omega_rows) + to) = omega;
            *reinterpret_cast<Float8*>(partial[own_partial][0] + column) = omega;
        }
    }
    __syncthreads();

    // Softmax over this group's members, in units of log 2.
    Float8 omega{};
    if (inside && row < rows)
        omega = *reinterpret_cast<const Float8*>(partial[row << plan.partials_log2][0] + column);
    const float scale = static_cast<float>(p.scale) * kLog2e;
    Float8 value_sum{};
    float maximum = -kInfinity, weight_sum = 0.0f;
    // Backwards, as the last keys that were read are the likeliest to be in the L2 cache.
    for (int first = plan.members_per_part - kUnroll; first >= 0; first -= kUnroll) {
        int token[kUnroll];
        find_tokens(token, first);
        uint4 k[kUnroll], v[kUnroll];
        float logit[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            logit[u] = token[u] < 0 ? -kInfinity : 0.0f;
            v[u] = load(value, token[u]);
            if (first >= plan.kept) k[u] = load(key, token[u]);
        }
        if (first < plan.kept) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) k[u] = kept_key[(first + u) * Traits::kThreads];
        }
        float largest = maximum;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Float8 k8 = unpack8<S>(k[u]);
            float dot = 0.0f, norm = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                dot += omega.x[i] * k8.x[i];
                norm += k8.x[i] * k8.x[i];
            }
            logit[u] += scale * lanes_sum<kLanes>(dot - 0.5f * norm);
            largest = fmaxf(largest, logit[u]);
        }
        const float shift = largest == -kInfinity ? 0.0f : largest;
        const float rescale = exp2_approx(maximum - shift);
        maximum = largest;
        weight_sum *= rescale;
#pragma unroll
        for (int i = 0; i < 8; ++i) value_sum.x[i] *= rescale;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Float8 v8 = unpack8<S>(v[u]);
            const float weight = exp2_approx(logit[u] - shift);
            weight_sum += weight;
#pragma unroll
            for (int i = 0; i < 8; ++i) value_sum.x[i] += weight * v8.x[i];
        }
    }
    float largest = maximum;
    for (int offset = kLanes; offset < merged * kLanes; offset *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    const float rescale = largest == -kInfinity ? 0.0f : exp2_approx(maximum - largest);
    weight_sum *= rescale;
#pragma unroll
    for (int i = 0; i < 8; ++i) value_sum.x[i] *= rescale;
    for (int offset = kLanes; offset < merged * kLanes; offset *= 2) {
        weight_sum += __shfl_xor_sync(0xffffffffu, weight_sum, offset);
#pragma unroll
        for (int i = 0; i < 8; ++i) value_sum.x[i] += __shfl_xor_sync(0xffffffffu, value_sum.x[i], offset);
    }
    if (leads) {
        *reinterpret_cast<Float8*>(partial[partial_idx][1] + column) = value_sum;
        if (column == 0) {
            partial_maximum[partial_idx] = largest;
            partial_weight[partial_idx] = weight_sum;
        }
    }
    __syncthreads();

    if (has_row && inside) {
        float largest = -kInfinity, total = 0.0f;
        for (int i = own_partial; i < own_partial + partials; ++i)
            largest = fmaxf(largest, partial_maximum[i]);
        Float8 sum{};
        for (int i = own_partial; i < own_partial + partials && largest > -kInfinity; ++i) {
            const float rescale = exp2_approx(partial_maximum[i] - largest);
            const Float8 term = *reinterpret_cast<const Float8*>(partial[i][1] + column);
            total += rescale * partial_weight[i];
#pragma unroll
            for (int d = 0; d < 8; ++d) sum.x[d] += rescale * term.x[d];
        }
        const float factor = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
        for (int d = 0; d < 8; ++d) sum.x[d] *= factor;
        *reinterpret_cast<uint4*>(static_cast<S*>(p.landmark_value) + own_row * head_dim + column) =
            pack8<S>(sum);
    }
}

// As many rows, up to `most`, as fill the machine's `slots` for CTAs most evenly.
inline int count_rows_per_cta(int num_rows, int most, int slots) {
    int best = 1;
    int64_t best_time = INT64_MAX;
    for (int rows = 1; rows <= most; ++rows) {
        // What a CTA does only once takes half the time of all its rows.
        const int64_t time = detail::ceil_div(detail::ceil_div(num_rows, rows), slots) * (2 * rows + most);
        if (time <= best_time) {
            best_time = time;
            best = rows;
        }
    }
    return best;
}

template <class S, int kHeadDim>
void launch_chunk_summary_fwd(const SummaryParams& p, cudaStream_t stream) {
    using Traits = SummaryFwdTraits<kHeadDim>;
    const Geometry& g = p.shape.geometry;
    SummaryFwdPlan plan{
        .chunks = ChunkBoxes::of(g),
        .parts_log2 = 0,
        .members_per_part = 0,
        .kept = 0,
        .partials_log2 = 0,
        .num_rows = static_cast<int>(p.shape.batch * p.shape.heads * g.num_chunks()),
        .rows_per_cta = 0,
    };
    if (plan.num_rows == 0) return;
    const auto members_per_part = [&] {
        const int64_t members = detail::ceil_div(plan.chunks.members.size(), int64_t{1} << plan.parts_log2);
        return static_cast<int>(detail::ceil_div(members, Traits::kUnroll) * Traits::kUnroll);
    };
    while (members_per_part() > Traits::kMembersPerPart && (2 << plan.parts_log2) <= Traits::kGroups)
        ++plan.parts_log2;
    plan.members_per_part = members_per_part();
    while ((Traits::kGroupsPerWarp << plan.partials_log2) < (1 << plan.parts_log2)) ++plan.partials_log2;

    plan.rows_per_cta = count_rows_per_cta(plan.num_rows, Traits::kGroups >> plan.parts_log2,
                                           multiprocessors() * Traits::kCtasPerSm);
    const int bytes = 4 * ((plan.rows_per_cta + 15) / 16 * 16) * kHeadDim * sizeof(__nv_bfloat16) +
                      (plan.rows_per_cta << plan.partials_log2) * sizeof(typename Traits::Partial) +
                      3 * Traits::kGroups * sizeof(float);
    // As many keys as fit beside the others' into an SM.
    constexpr int kBytesPerMember = Traits::kThreads * sizeof(uint4), kReserved = 1024;
    const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>() / Traits::kCtasPerSm;
    plan.kept = std::clamp((most - kReserved - bytes) / kBytesPerMember / Traits::kUnroll * Traits::kUnroll,
                           0, plan.members_per_part);
    const auto kernel = chunk_summary_fwd_kernel<S, kHeadDim>;
    static LimitsOf limits_of;
    limits_of(kernel);
    const auto blocks = static_cast<unsigned>(detail::ceil_div(plan.num_rows, plan.rows_per_cta));
    launch_dependent(kernel, blocks, Traits::kThreads, bytes + plan.kept * kBytesPerMember, stream, p, plan);
}

} // namespace eva_attn::cuda::mma
