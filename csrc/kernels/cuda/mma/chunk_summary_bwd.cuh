// Backward of the summaries, in three kernels: omega again, and the sums of the landmark gradients' pieces;
// from the gradients of landmark values to what each token needs of its chunk and to the gradient of omega;
// then through the projections.
#pragma once

#include "kernels/cuda/mma/bwd_utils.cuh"

namespace eva_attn::cuda::mma {

template <class S>
__device__ inline float parameter(const Projection& a, const void* data, int i) {
    if (a.dtype == DType::kFloat) return static_cast<const float*>(data)[i];
    return static_cast<float>(static_cast<const S*>(data)[i]);
}

// [rows, kColumns] of floats, whose columns are permuted by the row. Of rows of chunks neither four columns
// of two rows, nor pairs of columns of four rows, nor eight columns of every other row of eight meet in a
// bank; of weights neither pairs of columns of the rows nor every other row of the columns that products take
// together.
template <int kColumns, bool kIsWeight = false>
struct FloatTile {
    float* data;

    __device__ float* at(int row, int column) const {
        const int permutation = kIsWeight ? (row & 1) * 8 + (row & 2) + (row & 4) * 4
                                          : ((row ^ row >> 2) & 1) * 16 + (row & 2) * 4;
        return data + row * kColumns + (column ^ permutation);
    }
    __device__ float2& pair(int row, int column) const { return *reinterpret_cast<float2*>(at(row, column)); }
    __device__ float4& four(int row, int column) const {
        static_assert(!kIsWeight);
        return *reinterpret_cast<float4*>(at(row, column));
    }
};

// Numbers of rows are in registers as in a product's result, [columns / 8][4], with the columns dealt such
// that a lane has four in line: column_of(n, e) is that of number e of tile n.
__device__ inline int column_of(int n, int e) {
    return 16 * (n / 2) + threadIdx.x % 4 * 4 + n % 2 * 2 + e % 2;
}

// The means of up to kMaxChunks chunks go through the projections together: a warp takes 16 of them, one of
// the two projections and kPartColumns columns of the results.
template <class S_, int kHeadDim_>
struct ProjectionTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kTiles = kHeadDim / 8;
    static constexpr int kRowTiles = 2, kMaxChunks = 16 * kRowTiles;
    static constexpr int kPartColumns = 32, kParts = kHeadDim / kPartColumns, kPartTiles = kPartColumns / 8;
    static constexpr int kWarps = kRowTiles * 2 * kParts, kThreads = kWarps * kWarpSize;
    static constexpr int kCtasPerSm = kHeadDim == 64 ? 2 : 1;
    static constexpr int kStages = kHeadDim == 64 ? 2 : 1;
    static constexpr bool kKeepWeights = kHeadDim == 64; // in shared memory
    // Gradient of a Linear's weight: a warp takes 16 rows of one.
    static_assert(kWarps * 16 == 2 * kHeadDim);

    // Of the key's projection, of the query's. Factors of products are rounded to tf32.
    struct Weights {
        float weight[2][kKeepWeights ? kHeadDim * kHeadDim : 2];
        float bias[2][kHeadDim], norm_weight[2][kHeadDim];
    };
    static constexpr int kOmegaWarps = 8, kOmegaThreads = kOmegaWarps * kWarpSize;
    struct OmegaShared {
        Weights weights;
        float norm_bias[2][kHeadDim];
        float mean[kOmegaWarps][16 * kHeadDim];
    };
    struct Stage {
        float mean[2][kMaxChunks * kHeadDim];
        // Of landmark keys and of mu, in whose places the gradients of the Linears' outputs are left.
        float grad[2][kMaxChunks * kHeadDim];
    };
    struct Shared {
        Weights weights;
        // Of parts of rows, before the normalisation and of its gradient.
        float2 sums[2][2][kMaxChunks][kParts];
        Stage stage[kStages];
    };
};

struct SummaryGradPlan {
    BoxShape chunk;
    int chunks, columns; // per (batch, head), and per row of chunks
    int total;           // chunks in all
    int parts_log2;      // groups of lanes that share a chunk
    int passes;          // tokens that each of them takes
    int group;           // chunks that go through the projections together

    __device__ TokenBox box(const Geometry& g, int chunk_index) const {
        return TokenBox{
            .shape = chunk,
            .y0 = chunk_index / columns * chunk.height,
            .x0 = chunk_index % columns * chunk.width,
            .grid_height = static_cast<int>(g.grid_height),
            .grid_width = static_cast<int>(g.grid_width),
            .num_prefix_tokens = static_cast<int>(g.num_prefix_tokens),
        };
    }
};

__device__ inline bool has_norm(const SummaryParams& p, int branch) {
    return (branch ? p.query_projection : p.key_projection).norm_weight != nullptr;
}
// The key's projection is branch 0, the query's 1.
__device__ inline int count_branches(const SummaryParams& p) {
    return !p.has_projection ? 0 : p.has_query_projection ? 2 : 1;
}

template <int kHeadDim, int kThreads, class Weight>
__device__ inline void load_linear(float* shared, const Weight* weight, int head_dim) {
    constexpr int kCount = kHeadDim * kHeadDim / 4 / kThreads;
    float4 x[kCount];
    const auto row = [](int i) { return static_cast<int>(threadIdx.x + i * kThreads) / (kHeadDim / 4); };
    const int column = threadIdx.x % (kHeadDim / 4) * 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        x[i] = row(i) < head_dim && column < head_dim ? load4(weight + row(i) * head_dim + column) : float4{};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const FloatTile<kHeadDim, true> tile{shared};
        tile.pair(row(i), column) = make_float2(round_to_tf32(x[i].x), round_to_tf32(x[i].y));
        tile.pair(row(i), column + 2) = make_float2(round_to_tf32(x[i].z), round_to_tf32(x[i].w));
    }
}

// The LayerNorms' biases where they have a place.
template <class Traits, int kThreads>
__device__ inline void load_projections(const SummaryParams& p, typename Traits::Weights& weights,
                                        float (*norm_biases)[Traits::kHeadDim] = nullptr) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    for (int branch = 0; branch < branches; ++branch) {
        const Projection& a = branch ? p.query_projection : p.key_projection;
        if constexpr (Traits::kKeepWeights) {
            if (a.dtype == DType::kFloat) {
                load_linear<kHeadDim, kThreads>(weights.weight[branch], static_cast<const float*>(a.weight),
                                                head_dim);
            } else {
                load_linear<kHeadDim, kThreads>(weights.weight[branch], static_cast<const S*>(a.weight),
                                                head_dim);
            }
        }
    }
    if (threadIdx.x >= 2 * kHeadDim) return;
    const int branch = threadIdx.x / kHeadDim, i = threadIdx.x % kHeadDim;
    const Projection& a = branch ? p.query_projection : p.key_projection;
    const bool inside = branch < branches && i < head_dim;
    const float bias = inside && a.bias ? parameter<S>(a, a.bias, i) : 0.0f;
    const float norm_weight = inside && a.norm_weight ? parameter<S>(a, a.norm_weight, i) : 1.0f;
    const float norm_bias = inside && a.norm_bias ? parameter<S>(a, a.norm_bias, i) : 0.0f;
    weights.bias[branch][i] = bias;
    weights.norm_weight[branch][i] = norm_weight;
    if (norm_biases) norm_biases[branch][i] = norm_bias;
}

// 16 rows of head_dim floats from row `first` onward, of which `count` exist.
template <int kTiles>
__device__ inline void load_rows(float (&x)[kTiles][4], const void* rows, int first, int count,
                                 int head_dim) {
    const int group = threadIdx.x % kWarpSize / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float* const from = static_cast<const float*>(rows) + int64_t{first + group + 8 * r} * head_dim;
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            const bool exists = group + 8 * r < count && column_of(n, 0) < head_dim;
            const float4 y = exists ? *reinterpret_cast<const float4*>(from + column_of(n, 0)) : float4{};
            x[n][2 * r] = y.x, x[n][2 * r + 1] = y.y, x[n + 1][2 * r] = y.z, x[n + 1][2 * r + 1] = y.w;
        }
    }
}

// x += 16 rows of a tile.
template <int kTiles, int kColumns>
__device__ inline void add_rows(float (&x)[kTiles][4], FloatTile<kColumns> tile, int row, int first_column) {
    const int group = threadIdx.x % kWarpSize / 4;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float4 y = tile.four(row + group + 8 * r, first_column + column_of(n, 0));
            x[n][2 * r] += y.x, x[n][2 * r + 1] += y.y, x[n + 1][2 * r] += y.z, x[n + 1][2 * r + 1] += y.w;
        }
}

// A step of eight of a product of 16 rows: its factors' columns 0 .. 7 come in the order 0, 2, 4, 6, 1, 3,
// 5, 7, in which a lane's numbers lie.
__device__ inline void multiply_add_step(float (&c)[4], const float (&a)[4], const float2& b) {
    const uint32_t factor[4] = {__float_as_uint(a[0]), __float_as_uint(a[2]), __float_as_uint(a[1]),
                                __float_as_uint(a[3])};
    multiply_add_tf32(c, factor, __float_as_uint(b.x), __float_as_uint(b.y));
}

// Keeps 16 rows, rounded, as a product's first factor.
template <int kTiles, int kColumns>
__device__ inline void store_factor(FloatTile<kColumns> tile, int row, int first_column,
                                    const float (&x)[kTiles][4]) {
    const int group = threadIdx.x % kWarpSize / 4;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            tile.four(row + group + 8 * r, first_column + column_of(n, 0)) =
                make_float4(round_to_tf32(x[n][2 * r]), round_to_tf32(x[n][2 * r + 1]),
                            round_to_tf32(x[n + 1][2 * r]), round_to_tf32(x[n + 1][2 * r + 1]));
    __syncwarp();
}

// y += A W, or A W^T, of which y has the columns from `first_column` onward: 16 rows of `a` from `row`
// onward; W from `kept`, or where nothing is, from `weight`.
template <class Traits, bool kTransposed, int kTiles, class Weight>
__device__ inline void multiply_weight(float (&y)[kTiles][4], FloatTile<Traits::kHeadDim> a, int row,
                                       int first_column, const float* kept, const Weight* weight,
                                       int head_dim) {
    constexpr int kHeadDim = Traits::kHeadDim;
    const FloatTile<kHeadDim, true> tile{const_cast<float*>(kept)};
    const int group = threadIdx.x % kWarpSize / 4, pair = threadIdx.x % 4 * 2;
    const int own_column = first_column + group / 2 * 4 + group % 2;
#pragma unroll 2
    for (int k = 0; k < kHeadDim / 8; ++k) {
        const float2 upper = a.pair(row + group, 8 * k + pair), lower = a.pair(row + group + 8, 8 * k + pair);
        const float factor[4] = {upper.x, upper.y, lower.x, lower.y};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const int own = own_column + 16 * (n / 2) + n % 2 * 2, common = 8 * k + pair;
            float2 w{};
            if constexpr (Traits::kKeepWeights) {
                w = kTransposed ? tile.pair(own, common)
                                : make_float2(*tile.at(common, own), *tile.at(common + 1, own));
            } else if (own < head_dim && 8 * k < head_dim) {
                const Weight* const from =
                    weight + (kTransposed ? own * head_dim + common : common * head_dim + own);
                w = make_float2(round_to_tf32(static_cast<float>(from[0])),
                                round_to_tf32(static_cast<float>(from[kTransposed ? 1 : head_dim])));
            }
            multiply_add_step(y[n], factor, w);
        }
    }
}
template <class Traits, bool kTransposed, int kTiles>
__device__ inline void multiply_weight(float (&y)[kTiles][4], FloatTile<Traits::kHeadDim> a, int row,
                                       int first_column, const SummaryParams& p,
                                       const typename Traits::Weights& weights, int branch) {
    using S = typename Traits::S;
    const Projection& projection = branch ? p.query_projection : p.key_projection;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const float* const kept = weights.weight[branch];
    if (Traits::kKeepWeights || projection.dtype == DType::kFloat) {
        multiply_weight<Traits, kTransposed>(y, a, row, first_column, kept,
                                             static_cast<const float*>(projection.weight), head_dim);
    } else {
        multiply_weight<Traits, kTransposed>(y, a, row, first_column, kept,
                                             static_cast<const S*>(projection.weight), head_dim);
    }
}

// Of 16 means columns of the Linear's output.
template <class Traits, int kTiles>
__device__ inline void apply_linear(float (&y)[kTiles][4], FloatTile<Traits::kHeadDim> means, int row,
                                    int first_column, const SummaryParams& p,
                                    const typename Traits::Weights& weights, int branch) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[n][e] = weights.bias[branch][first_column + column_of(n, e)];
    multiply_weight<Traits, true>(y, means, row, first_column, p, weights, branch);
}

// Of 16 means the output of the Linear, normalised where there is a LayerNorm.
template <class Traits>
__device__ inline void project(float (&y)[Traits::kTiles][4], FloatTile<Traits::kHeadDim> means,
                               const SummaryParams& p, const typename Traits::Weights& weights, int branch) {
    constexpr int kTiles = Traits::kTiles;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    apply_linear<Traits>(y, means, 0, 0, p, weights, branch);
    if (!has_norm(p, branch)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float center = 0, variance = 0;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) center += y[n][2 * r] + y[n][2 * r + 1];
        center = quad_sum(center) / head_dim;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; ++e) {
                y[n][e] = column_of(n, e) < head_dim ? y[n][e] - center : 0.0f;
                variance += y[n][e] * y[n][e];
            }
        variance = quad_sum(variance) / head_dim;
        const float rstd = 1.0f / sqrtf(variance + static_cast<float>(p.norm_eps));
#pragma unroll
        for (int n = 0; n < kTiles; ++n) y[n][2 * r] *= rstd, y[n][2 * r + 1] *= rstd;
    }
}

// The row that a chunk has in the landmark gradients' first pieces.
__device__ inline int64_t landmark_row(const SummaryParams& p, const SummaryGradPlan& plan, int chunk) {
    const int bh = chunk / plan.chunks;
    return bh * p.pieces * p.global_columns + (chunk - bh * plan.chunks);
}

// Adds the pieces of a landmark gradient to the first, four columns a thread.
template <int kThreads>
__device__ inline void sum_pieces(const SummaryParams& p, const SummaryGradPlan& plan, void* pieces) {
    if (p.pieces == 1) return;
    const int head_dim = static_cast<int>(p.shape.head_dim), lanes = head_dim / 4;
    const int64_t stride = p.global_columns * head_dim;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < int64_t{plan.total} * lanes;
         i += int64_t{gridDim.x} * kThreads) {
        const int chunk = static_cast<int>(i / lanes), column = static_cast<int>(i % lanes) * 4;
        float* const sums = static_cast<float*>(pieces) + landmark_row(p, plan, chunk) * head_dim + column;
        const float* from = sums;
        float4 sum{};
#pragma unroll 8
        for (int piece = 0; piece < static_cast<int>(p.pieces); ++piece, from += stride) {
            const float4 x = *reinterpret_cast<const float4*>(from);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        *reinterpret_cast<float4*>(sums) = sum;
    }
}

// omega, in mu_rows, and the sums of the landmark gradients' pieces.
template <class Traits>
__global__ void __launch_bounds__(Traits::kOmegaThreads, Traits::kCtasPerSm)
    chunk_omega_kernel(const __grid_constant__ SummaryParams p,
                       const __grid_constant__ SummaryGradPlan plan) {
    constexpr int kTiles = Traits::kTiles, kWarps = Traits::kOmegaWarps;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::OmegaShared*>(memory);
    auto& weights = shared.weights;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4;
    load_projections<Traits, Traits::kOmegaThreads>(p, weights, shared.norm_bias);
    sum_pieces<Traits::kOmegaThreads>(p, plan, p.grad_landmark_value);
    sum_pieces<Traits::kOmegaThreads>(p, plan, p.grad_landmark_key);
    __syncthreads();
    for (int first = 16 * (blockIdx.x * kWarps + warp); first < plan.total;
         first += 16 * gridDim.x * kWarps) {
        float omega[kTiles][4] = {};
        if (p.noise) load_rows(omega, p.noise, first, plan.total - first, head_dim);
        for (int branch = 0; branch < 2 && (!p.has_projection || p.has_query_projection); ++branch) {
            float y[kTiles][4];
            load_rows(y, branch ? p.query_mean : p.key_mean, first, plan.total - first, head_dim);
            if (branches > 0) {
                const FloatTile<Traits::kHeadDim> means{shared.mean[warp]};
                __syncwarp();
                store_factor(means, 0, 0, y);
                project<Traits>(y, means, p, weights, branch);
            }
            const float factor = static_cast<float>(p.mu_scale);
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int d = column_of(n, e);
                    omega[n][e] +=
                        factor * (y[n][e] * weights.norm_weight[branch][d] + shared.norm_bias[branch][d]);
                }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int chunk = first + group + 8 * r;
            if (chunk >= plan.total) continue;
            float* const to = static_cast<float*>(p.mu_rows) + int64_t{chunk} * head_dim;
#pragma unroll
            for (int n = 0; n < kTiles; n += 2)
                if (column_of(n, 0) < head_dim)
                    *reinterpret_cast<float4*>(to + column_of(n, 0)) = make_float4(
                        omega[n][2 * r], omega[n][2 * r + 1], omega[n + 1][2 * r], omega[n + 1][2 * r + 1]);
        }
    }
}

// A running softmax over tokens of a chunk, weighted by g = grad_beta . v, in units of log 2: a lane holds
// eight columns of the sums over the tokens that its group of lanes saw.
struct ChunkSoftmax {
    float maximum = -kInfinity, sum = 0, sum_g = 0;
    float sum_gk[8] = {}, sum_k[8] = {};

    // Brings the sums to a maximum that is at least the own; returns what to subtract from logits.
    __device__ float raise(float to) {
        const float shift = to == -kInfinity ? 0.0f : to;
        const float factor = exp2_approx(maximum - shift);
        maximum = to;
        sum *= factor;
        sum_g *= factor;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum_gk[i] *= factor, sum_k[i] *= factor;
        return shift;
    }
    __device__ void add(float weight, float g, const float (&key)[8]) {
        sum += weight;
        sum_g += weight * g;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum_gk[i] += weight * g * key[i];
            sum_k[i] += weight * key[i];
        }
    }
    // Adds what the groups of lanes hold that are `offset` lanes away.
    __device__ void combine(int offset) {
        const auto shuffle = [offset](float x) { return __shfl_xor_sync(0xffffffffu, x, offset); };
        raise(fmaxf(maximum, shuffle(maximum)));
        sum += shuffle(sum);
        sum_g += shuffle(sum_g);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum_gk[i] += shuffle(sum_gk[i]);
            sum_k[i] += shuffle(sum_k[i]);
        }
    }
};

template <class S_, int kHeadDim_>
struct ChunkTokensTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kThreads = 256;
    static constexpr int kUnits = kHeadDim / 8; // lanes that share a token
    static constexpr int kGroups = kThreads / kUnits;
    static constexpr int kUnroll = 2; // tokens of a group that are taken together; as many are under way
    static_assert(kUnits % kUnroll == 0);

    struct Part { // what one warp saw of a chunk
        float maximum, sum, sum_g, unused;
        float sum_gk[kHeadDim], sum_k[kHeadDim];
    };
};

// token_weight, token_grad, chunk_stats, omega and grad_beta; in mu_rows the gradient of mu's two terms.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    chunk_tokens_bwd_kernel(const __grid_constant__ SummaryParams p,
                            const __grid_constant__ SummaryGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kUnits = Traits::kUnits, kUnroll = Traits::kUnroll;
    __shared__ typename Traits::Part part[Traits::kThreads / kWarpSize];

    const Geometry& g = p.shape.geometry;
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const int num_tokens = static_cast<int>(g.num_tokens());
    const int unit = threadIdx.x % kUnits, column = unit * 8;
    const int parts = 1 << plan.parts_log2, own_part = threadIdx.x / kUnits & (parts - 1);
    const int index =
        blockIdx.x * (Traits::kGroups >> plan.parts_log2) + (threadIdx.x / kUnits >> plan.parts_log2);
    const bool active = index < plan.total, in_row = active && column < head_dim;
    const bool has_mu = !p.has_projection || p.has_query_projection;
    const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;

    const int bh = index / plan.chunks, within = index - bh * plan.chunks;
    const int batch = bh / heads, head = bh - batch * heads;
    const TokenBox box = plan.box(g, within);
    const bool* const mask = p.key_padding_mask ? p.key_padding_mask + int64_t{batch} * num_tokens : nullptr;
    float* const token_weight = static_cast<float*>(p.token_weight) + int64_t{bh} * num_tokens;
    float* const token_grad = static_cast<float*>(p.token_grad) + int64_t{bh} * num_tokens;
    const int64_t row = int64_t{index} * head_dim + column; // in the chunks' arrays
    const auto token_of = [&](int pass) {
        return active && pass < plan.passes ? box.token((pass << plan.parts_log2) + own_part) : -1;
    };

    const char* const keys =
        reinterpret_cast<const char*>(head_rows<S>(p.key, batch, head) + (in_row ? column : 0));
    const char* const values =
        reinterpret_cast<const char*>(head_rows<S>(p.value, batch, head) + (in_row ? column : 0));
    const int key_stride = static_cast<int>(p.key.token_stride * sizeof(S));
    const int value_stride = static_cast<int>(p.value.token_stride * sizeof(S));
    uint4 key_row[kUnroll], value_row[kUnroll], next_key[kUnroll], next_value[kUnroll];
    bool valid[kUnroll], next_valid[kUnroll];
    const auto load = [&](int pass) {
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
            const int token = token_of(pass + j);
            next_valid[j] = token >= 0 && !(mask && mask[token]);
            next_key[j] = next_value[j] = uint4{};
            if (next_valid[j] && in_row) {
                next_key[j] = *reinterpret_cast<const uint4*>(keys + int64_t{token} * key_stride);
                next_value[j] = *reinterpret_cast<const uint4*>(values + int64_t{token} * value_stride);
            }
        }
    };
    load(0);
    float omega[8] = {}, grad_beta[8] = {};
    if (in_row) {
        load_floats(omega, static_cast<const float*>(p.mu_rows) + row);
        load_floats(grad_beta, static_cast<const float*>(p.grad_landmark_value) +
                                   landmark_row(p, plan, index) * head_dim + column);
        if (own_part == 0) {
            pack_row(static_cast<S*>(p.omega) + row, omega);
            pack_row(static_cast<S*>(p.grad_beta) + row, grad_beta);
        }
    }

    // kUnits passes make a batch: each lane keeps the logit and g of one of its group's tokens; if there is
    // another batch, it leaves both where the token's results will stand.
    ChunkSoftmax softmax;
    float kept_logit = -kInfinity, kept_g = 0;
    const bool one_batch = plan.passes <= kUnits;
    for (int pass = 0; pass < plan.passes; pass += kUnroll) {
#pragma unroll
        for (int j = 0; j < kUnroll; ++j)
            key_row[j] = next_key[j], value_row[j] = next_value[j], valid[j] = next_valid[j];
        load(pass + kUnroll);
        float logit[kUnroll], token_g[kUnroll];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
            float key[8], value[8];
            unpack_row<S>(key, key_row[j]);
            unpack_row<S>(value, value_row[j]);
            logit[j] = token_g[j] = 0;
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                logit[j] += key[d] * (omega[d] - 0.5f * key[d]);
                token_g[j] += grad_beta[d] * value[d];
            }
        }
#pragma unroll
        for (int offset = 1; offset < kUnits; offset *= 2)
#pragma unroll
            for (int j = 0; j < kUnroll; ++j) {
                logit[j] += __shfl_xor_sync(0xffffffffu, logit[j], offset);
                token_g[j] += __shfl_xor_sync(0xffffffffu, token_g[j], offset);
            }
        float largest = softmax.maximum;
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
            logit[j] = valid[j] ? logit[j] * scale_log2 : -kInfinity;
            largest = fmaxf(largest, logit[j]);
            if ((pass + j) % kUnits == unit) kept_logit = logit[j], kept_g = token_g[j];
        }
        const float shift = softmax.raise(largest);
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
            float key[8];
            unpack_row<S>(key, key_row[j]);
            softmax.add(exp2_approx(logit[j] - shift), token_g[j], key);
        }
        if (one_batch || ((pass + kUnroll) % kUnits != 0 && pass + kUnroll < plan.passes)) continue;
        const int token = token_of(pass / kUnits * kUnits + unit);
        if (token >= 0) token_weight[token] = kept_logit, token_grad[token] = kept_g;
    }
    for (int offset = kUnits; offset < min(kWarpSize, kUnits << plan.parts_log2); offset *= 2)
        softmax.combine(offset);
    if (kUnits << plan.parts_log2 > kWarpSize) {
        const int warp = threadIdx.x / kWarpSize, warps = (kUnits << plan.parts_log2) / kWarpSize;
        if (threadIdx.x % kWarpSize < kUnits) {
            part[warp].maximum = softmax.maximum;
            part[warp].sum = softmax.sum;
            part[warp].sum_g = softmax.sum_g;
            store_floats(part[warp].sum_gk + column, softmax.sum_gk);
            store_floats(part[warp].sum_k + column, softmax.sum_k);
        }
        __syncthreads();
        softmax = ChunkSoftmax{};
        for (int i = warp / warps * warps; i < (warp / warps + 1) * warps; ++i) {
            const float shift = softmax.raise(fmaxf(softmax.maximum, part[i].maximum));
            const float factor = exp2_approx(part[i].maximum - shift);
            softmax.sum += factor * part[i].sum;
            softmax.sum_g += factor * part[i].sum_g;
            float x[8], y[8];
            load_floats(x, part[i].sum_gk + column);
            load_floats(y, part[i].sum_k + column);
#pragma unroll
            for (int d = 0; d < 8; ++d) softmax.sum_gk[d] += factor * x[d], softmax.sum_k[d] += factor * y[d];
        }
    }

    const float inverse = softmax.sum > 0 ? 1.0f / softmax.sum : 0.0f;
    const float mean_g = softmax.sum_g * inverse;
    for (int pass = unit; pass < plan.passes; pass += kUnits) {
        const int token = token_of(pass);
        if (token < 0) continue;
        const float logit = one_batch ? kept_logit : token_weight[token];
        const float token_g = one_batch ? kept_g : token_grad[token];
        const float weight = logit == -kInfinity ? 0.0f : exp2_approx(logit - softmax.maximum) * inverse;
        token_weight[token] = weight;
        token_grad[token] = scale * weight * (token_g - mean_g);
    }
    if (own_part != 0 || !in_row) return;
    float grad_mu[8];
    const float factor = has_mu ? scale * static_cast<float>(p.mu_scale) * inverse : 0.0f;
#pragma unroll
    for (int d = 0; d < 8; ++d) grad_mu[d] = factor * (softmax.sum_gk[d] - mean_g * softmax.sum_k[d]);
    store_floats(static_cast<float*>(p.mu_rows) + row, grad_mu);
    if (!has_mu) pack_row(static_cast<S*>(p.grad_query_mean) + row, grad_mu);
    if (unit != 0) return;
    float* const stats = static_cast<float*>(p.chunk_stats) + 2 * int64_t{index};
    stats[0] = softmax.sum > 0 ? (softmax.maximum + log2f(softmax.sum)) * kLn2 : 0.0f;
    stats[1] = mean_g;
}

// Adds the sums over 16 rows; of a warp's 8 kTiles columns a lane takes kTiles / 4, number i of which is
// column summed_column(i).
template <int kTiles>
__device__ inline void add_columns(float (&sums)[kTiles / 4], const float (&rows)[kTiles][4]) {
    const int lane = threadIdx.x % kWarpSize;
    float x[2 * kTiles];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) x[i] = rows[i / 2][i % 2] + rows[i / 2][i % 2 + 2];
#pragma unroll
    for (int step = 0; step < 3; ++step) {
        const int offset = 16 >> step, width = kTiles >> step;
        const bool upper = lane & offset;
#pragma unroll
        for (int i = 0; i < width; ++i) {
            const float sent = upper ? x[i] : x[i + width];
            x[i] = (upper ? x[i + width] : x[i]) + __shfl_xor_sync(0xffffffffu, sent, offset);
        }
    }
#pragma unroll
    for (int i = 0; i < kTiles / 4; ++i) sums[i] += x[i];
}
template <int kTiles>
__device__ inline int summed_column(int i) {
    const int lane = threadIdx.x % kWarpSize, index = lane / 4 * (kTiles / 4) + i;
    return column_of(index / 2, index % 2);
}

// Begins to copy what the projections' gradients need of a group of chunks.
template <class Traits>
__device__ inline void load_group(const SummaryParams& p, const SummaryGradPlan& plan,
                                  typename Traits::Stage& stage, int first) {
    constexpr int kLanes = Traits::kHeadDim / 4, kRows = Traits::kThreads / kLanes;
    using RowTile = FloatTile<Traits::kHeadDim>;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    const int count = min(plan.group, plan.total - first);
    const int column = threadIdx.x % kLanes * 4;
#pragma unroll
    for (int i = 0; i < Traits::kMaxChunks / kRows; ++i) {
        const int row = threadIdx.x / kLanes + i * kRows;
        const bool exists = row < count && column < head_dim;
        const int64_t at = int64_t{first + row} * head_dim + column;
        const auto copy = [&](float* tile, const void* rows, int64_t from) {
            copy_async(RowTile{tile}.at(row, column), static_cast<const float*>(rows) + from, exists);
        };
        copy(stage.grad[0], p.grad_landmark_key, landmark_row(p, plan, first + row) * head_dim + column);
        copy(stage.grad[1], p.mu_rows, at);
        if (branches > 0) copy(stage.mean[0], p.key_mean, at);
        if (branches > 1) copy(stage.mean[1], p.query_mean, at);
    }
    copy_commit();
}

// From the gradients of landmark keys and of mu to those of the means and of the projections.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    chunk_projections_bwd_kernel(const __grid_constant__ SummaryParams p,
                                 const __grid_constant__ SummaryGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kTiles = Traits::kTiles, kParts = Traits::kParts,
                  kPartTiles = Traits::kPartTiles, kRowTiles = Traits::kRowTiles, kStages = Traits::kStages;
    using RowTile = FloatTile<kHeadDim>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    const auto& weights = shared.weights;

    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, pair = lane % 4 * 2;
    // The warp's projection; the first of its chunks in a group of chunks and of its columns.
    const int branch = warp / kParts % 2, row_tile = warp / (2 * kParts), part = warp % kParts;
    const int row = 16 * row_tile, first_column = Traits::kPartColumns * part;
    const bool active = branch < branches || branches == 0, norm = has_norm(p, branch);
    const int step = gridDim.x * plan.group;
    load_group<Traits>(p, plan, shared.stage[0], blockIdx.x * plan.group);
    load_projections<Traits, Traits::kThreads>(p, shared.weights);

    const bool counts_padding = p.mean_divisor == 0 && p.key_padding_mask;
    // What a chunk's mean was divided by, padding included.
    const auto divisor_of = [&](int chunk_index) {
        if (p.mean_divisor != 0) return static_cast<int>(p.mean_divisor);
        const TokenBox box = plan.box(g, chunk_index % plan.chunks);
        return min(plan.chunk.height, box.grid_height - box.y0) *
               min(plan.chunk.width, box.grid_width - box.x0);
    };
    // Of the whole warp.
    const auto count_padding = [&](int chunk_index) {
        const int bh = chunk_index / plan.chunks;
        const TokenBox box = plan.box(g, chunk_index - bh * plan.chunks);
        const bool* const mask = p.key_padding_mask + bh / static_cast<int>(p.shape.heads) * g.num_tokens();
        int padding = 0;
        for (int i = lane; i < plan.chunk.size(); i += kWarpSize) {
            const int token = box.token(i);
            padding += token >= 0 && mask[token];
        }
        return static_cast<int>(__reduce_add_sync(0xffffffffu, padding));
    };

    float grad_weight[kTiles][4] = {}, grad_bias[2] = {};
    float grad_norm_weight[1] = {}, grad_norm_bias[1] = {};
    int index = 0; // of the stage
    for (int first = blockIdx.x * plan.group; first < plan.total; first += step) {
        const int count = min(plan.group, plan.total - first); // chunks of the group
        const int own = count - row;                           // the warp's among them, if positive
        typename Traits::Stage& stage = shared.stage[index];
        const RowTile means{stage.mean[branch]}, grads{stage.grad[branch]};
        copy_wait<0>();
        __syncthreads();
        if (kStages == 2) {
            index ^= 1;
            if (first + step < plan.total) load_group<Traits>(p, plan, shared.stage[index], first + step);
        }

        float hat[kPartTiles][4] = {}, grad[kPartTiles][4] = {}, rstd[2];
        const auto load_grad = [&] {
            add_rows(grad, RowTile{stage.grad[1]}, row, first_column);
            if (branch == 0) add_rows(grad, RowTile{stage.grad[0]}, row, first_column);
        };
        if (branches == 0) {
            load_grad();
        } else {
            const auto sums = [&](int which, int r) {
                return shared.sums[which][branch][row + group + 8 * r];
            };
            if (active) {
                add_rows(hat, means, row, first_column);
                store_factor(means, row, first_column, hat);
            }
            __syncthreads();
            if (active) {
                apply_linear<Traits>(hat, means, row, first_column, p, weights, branch);
#pragma unroll
                for (int r = 0; norm && r < 2; ++r) { // sum, and sum of squares about the part's own mean
                    float sum = 0, squares = 0;
#pragma unroll
                    for (int n = 0; n < kPartTiles; ++n) sum += hat[n][2 * r] + hat[n][2 * r + 1];
                    sum = quad_sum(sum);
                    const float center = sum / max(min(head_dim - first_column, Traits::kPartColumns), 1);
#pragma unroll
                    for (int n = 0; n < kPartTiles; ++n)
#pragma unroll
                        for (int e = 2 * r; e < 2 * r + 2; ++e) {
                            const float x = hat[n][e] - center;
                            if (first_column + column_of(n, e) < head_dim) squares += x * x;
                        }
                    squares = quad_sum(squares);
                    if (pair == 0) sums(0, r)[part] = make_float2(sum, squares);
                }
            }
            __syncthreads();
            load_grad();
            if (active && norm) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float center = 0, variance = 0;
#pragma unroll
                    for (int i = 0; i < kParts; ++i) center += sums(0, r)[i].x;
                    center /= head_dim;
#pragma unroll
                    for (int i = 0; i < kParts; ++i) {
                        const int columns = min(head_dim - Traits::kPartColumns * i, Traits::kPartColumns);
                        if (columns <= 0) continue;
                        const float2 sum = sums(0, r)[i];
                        const float offset = sum.x / columns - center;
                        variance += sum.y + columns * offset * offset;
                    }
                    rstd[r] = 1.0f / sqrtf(variance / head_dim + static_cast<float>(p.norm_eps));
#pragma unroll
                    for (int n = 0; n < kPartTiles; ++n)
#pragma unroll
                        for (int e = 2 * r; e < 2 * r + 2; ++e) hat[n][e] = (hat[n][e] - center) * rstd[r];
                }
                add_columns(grad_norm_bias, grad);
                float product[kPartTiles][4];
#pragma unroll
                for (int n = 0; n < kPartTiles; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) product[n][e] = grad[n][e] * hat[n][e];
                add_columns(grad_norm_weight, product);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float2 sum{};
#pragma unroll
                    for (int n = 0; n < kPartTiles; ++n)
#pragma unroll
                        for (int e = 2 * r; e < 2 * r + 2; ++e) {
                            grad[n][e] *= weights.norm_weight[branch][first_column + column_of(n, e)];
                            sum.x += grad[n][e];
                            sum.y += grad[n][e] * hat[n][e];
                        }
                    sum = make_float2(quad_sum(sum.x), quad_sum(sum.y));
                    if (pair == 0) sums(1, r)[part] = sum;
                }
            }
            __syncthreads();
            if (active) {
#pragma unroll
                for (int r = 0; norm && r < 2; ++r) {
                    float mean = 0, mean_hat = 0;
#pragma unroll
                    for (int i = 0; i < kParts; ++i) mean += sums(1, r)[i].x, mean_hat += sums(1, r)[i].y;
                    mean /= head_dim;
                    mean_hat /= head_dim;
#pragma unroll
                    for (int n = 0; n < kPartTiles; ++n)
#pragma unroll
                        for (int e = 2 * r; e < 2 * r + 2; ++e)
                            grad[n][e] = first_column + column_of(n, e) < head_dim && group + 8 * r < own
                                             ? (grad[n][e] - mean - hat[n][e] * mean_hat) * rstd[r]
                                             : 0.0f;
                }
                // Now the gradient of the Linear's output; then that of the means.
                store_factor(grads, row, first_column, grad);
            }
            __syncthreads();
            if (active) {
#pragma unroll
                for (int n = 0; n < kPartTiles; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) grad[n][e] = 0;
                multiply_weight<Traits, false>(grad, grads, row, first_column, p, weights, branch);
            }
        }
        if (active) {
            S* const out = static_cast<S*>(branch ? p.grad_query_mean : p.grad_key_mean);
            int divisor[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) divisor[r] = divisor_of(first + row + group + 8 * r);
            for (int i = 0; counts_padding && i < min(own, 16); ++i) {
                const int padding = count_padding(first + row + i);
                if (i == group) divisor[0] -= padding;
                if (i == group + 8) divisor[1] -= padding;
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float factor = 1.0f / static_cast<float>(max(divisor[r], 1));
#pragma unroll
                for (int n = 0; n < kPartTiles; n += 2) {
                    const int column = first_column + column_of(n, 0);
                    if (column < head_dim && group + 8 * r < own)
                        *reinterpret_cast<uint2*>(out + int64_t{first + row + group + 8 * r} * head_dim +
                                                  column) =
                            uint2{pack<S>(factor * grad[n][2 * r], factor * grad[n][2 * r + 1]),
                                  pack<S>(factor * grad[n + 1][2 * r], factor * grad[n + 1][2 * r + 1])};
                }
            }
        }
        if (branches > 0) {
            __syncthreads();
            // Gradient of the Linear's weight and bias.
            const int branch = warp / (kHeadDim / 16), out_row = warp % (kHeadDim / 16) * 16;
            const RowTile means{stage.mean[branch]}, grads{stage.grad[branch]};
#pragma unroll 1
            for (int k = 0; branch < branches && k < count; k += 8) {
                const float a[4] = {
                    *grads.at(k + pair, out_row + group), *grads.at(k + pair + 1, out_row + group),
                    *grads.at(k + pair, out_row + group + 8), *grads.at(k + pair + 1, out_row + group + 8)};
                grad_bias[0] += a[0] + a[1];
                grad_bias[1] += a[2] + a[3];
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
                    multiply_add_step(grad_weight[n], a,
                                      make_float2(*means.at(k + pair, 8 * n + group),
                                                  *means.at(k + pair + 1, 8 * n + group)));
            }
        }
        if (kStages == 1 && first + step < plan.total) {
            __syncthreads();
            load_group<Traits>(p, plan, shared.stage[0], first + step);
        }
    }

    if (branches == 0) return;
    // Of a projection: the Linear's weight [D, D], its bias, the LayerNorm's weight and bias.
    const int size = (head_dim + 3) * head_dim;
    float* const out = static_cast<float*>(p.grad_projections) + int64_t{blockIdx.x} * 2 * size;
    {
        const int branch = warp / (kHeadDim / 16), out_row = warp % (kHeadDim / 16) * 16;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int o = out_row + group + 8 * r;
            const float bias = quad_sum(grad_bias[r]);
            if (o >= head_dim) continue;
            if (pair == 0) out[branch * size + head_dim * head_dim + o] = bias;
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
                if (8 * n < head_dim)
                    *reinterpret_cast<float2*>(out + branch * size + o * head_dim + 8 * n + pair) =
                        make_float2(grad_weight[n][2 * r], grad_weight[n][2 * r + 1]);
        }
    }
    // LayerNorm: [weight or bias][branch][row tile][column].
    float* const sums = shared.stage[0].mean[0];
    __syncthreads();
    const int at = (branch * kRowTiles + row_tile) * kHeadDim + first_column + summed_column<kPartTiles>(0);
    sums[at] = grad_norm_weight[0];
    sums[at + 2 * kRowTiles * kHeadDim] = grad_norm_bias[0];
    __syncthreads();
    for (int i = threadIdx.x; i < 4 * kHeadDim; i += Traits::kThreads) {
        const int which = i / (2 * kHeadDim), branch = i / kHeadDim % 2, column = i % kHeadDim;
        if (column >= head_dim) continue;
        float sum = 0;
        for (int tile = 0; tile < kRowTiles; ++tile)
            sum += sums[((which * 2 + branch) * kRowTiles + tile) * kHeadDim + column];
        out[branch * size + (head_dim + 1 + which) * head_dim + column] = sum;
    }
}

template <class Traits>
int count_projection_blocks(const SummaryGradPlan& plan) {
    return static_cast<int>(
        detail::max(1, detail::min(132 * Traits::kCtasPerSm, detail::ceil_div(plan.total, plan.group))));
}

template <class S, int kHeadDim>
SummaryGradPlan plan_chunk_summary_bwd(const SummaryParams& p) {
    using Projections = ProjectionTraits<S, kHeadDim>;
    using Tokens = ChunkTokensTraits<S, kHeadDim>;
    const Geometry& g = p.shape.geometry;
    SummaryGradPlan plan{
        .chunk = BoxShape::of(g.chunk_height, g.chunk_width),
        .chunks = static_cast<int>(g.num_chunks()),
        .columns = static_cast<int>(g.chunk_columns()),
        .total = static_cast<int>(p.shape.batch * p.shape.heads * g.num_chunks()),
        .parts_log2 = 0,
        .passes = 1,
        .group = 1,
    };
    // As many groups of chunks as fill the GPUs of the day evenly, by the shape alone.
    const int64_t blocks = 132 * Projections::kCtasPerSm;
    const int64_t rounds = detail::max(1, detail::ceil_div(plan.total, blocks * Projections::kMaxChunks));
    plan.group = static_cast<int>(detail::max(1, detail::ceil_div(plan.total, blocks * rounds)));
    while (Tokens::kUnits << plan.parts_log2 < plan.chunk.size() && 2 << plan.parts_log2 <= Tokens::kGroups)
        ++plan.parts_log2;
    plan.passes = static_cast<int>(detail::ceil_div(plan.chunk.size(), int64_t{1} << plan.parts_log2));
    return plan;
}

template <class S, int kHeadDim>
int64_t count_projection_pieces(const SummaryParams& p) {
    return count_projection_blocks<ProjectionTraits<S, kHeadDim>>(plan_chunk_summary_bwd<S, kHeadDim>(p));
}

template <class S, int kHeadDim>
void launch_chunk_summary_bwd(const SummaryParams& p, cudaStream_t stream) {
    using Projections = ProjectionTraits<S, kHeadDim>;
    using Tokens = ChunkTokensTraits<S, kHeadDim>;
    const SummaryGradPlan plan = plan_chunk_summary_bwd<S, kHeadDim>(p);
    if (plan.total > 0) {
        constexpr int kBytes = sizeof(typename Projections::Shared),
                      kOmegaBytes = sizeof(typename Projections::OmegaShared);
        const int projection_blocks = count_projection_blocks<Projections>(plan);
        const int chunks_per_block = Tokens::kGroups >> plan.parts_log2;
        const int64_t omega_blocks =
            detail::ceil_div(plan.total * p.shape.head_dim, 8 * Projections::kOmegaThreads);
        cudaFuncSetAttribute(chunk_omega_kernel<Projections>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kOmegaBytes);
        cudaFuncSetAttribute(chunk_projections_bwd_kernel<Projections>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
        chunk_omega_kernel<Projections>
            <<<static_cast<unsigned>(detail::min(omega_blocks, 132 * Projections::kCtasPerSm)),
               Projections::kOmegaThreads, kOmegaBytes, stream>>>(p, plan);
        chunk_tokens_bwd_kernel<Tokens>
            <<<static_cast<unsigned>(detail::ceil_div(plan.total, chunks_per_block)), Tokens::kThreads, 0,
               stream>>>(p, plan);
        chunk_projections_bwd_kernel<Projections>
            <<<projection_blocks, Projections::kThreads, kBytes, stream>>>(p, plan);
    }
}

} // namespace eva_attn::cuda::mma
