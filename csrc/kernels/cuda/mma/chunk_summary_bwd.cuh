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

// [rows, kColumns] of floats; groups of eight columns are permuted by the row, so that neither eight rows of
// a column nor pairs of columns of four rows meet in a bank.
template <int kColumns>
struct FloatTile {
    float* data;

    __device__ float* at(int row, int column) const {
        return data + row * kColumns + (column ^ ((row & 3) ^ (row >> 2 & 1)) * 8);
    }
    __device__ float2& pair(int row, int column) const { return *reinterpret_cast<float2*>(at(row, column)); }
};

// The means of up to kMaxChunks chunks go through the projections together: a warp takes 16 of them, and one
// of the two projections. Numbers are in registers as in a product's result: [columns / 8][4].
template <class S_, int kHeadDim_>
struct ProjectionTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
    static constexpr int kCtasPerSm = kHeadDim == 64 ? 2 : 1;
    static constexpr int kTiles = kHeadDim / 8;
    static constexpr int kRowTiles = kHeadDim == 64 ? 4 : 2;
    static constexpr int kMaxChunks = 16 * kRowTiles;
    static constexpr bool kKeepWeights = kHeadDim == 64; // in shared memory
    // Gradient of a Linear's weight: 16 rows of it make a tile.
    static constexpr int kWeightTiles = 2 * kHeadDim / 16 / kWarps;

    // Of the key's projection, of the query's. Factors of products are rounded to tf32.
    struct Weights {
        float weight[2][kKeepWeights ? kHeadDim * kHeadDim : 2];
        float bias[2][kHeadDim], norm_weight[2][kHeadDim], norm_bias[2][kHeadDim];
    };
    struct OmegaShared {
        Weights weights;
        float mean[kWarps][16 * kHeadDim];
    };
    struct Shared {
        Weights weights;
        float mean[2][kMaxChunks * kHeadDim];
        float grad_linear[2][kMaxChunks * kHeadDim];
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

template <class Traits, class Weight>
__device__ inline void load_linear(float* shared, const Weight* weight, int head_dim) {
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads;
    constexpr int kCount = kHeadDim * kHeadDim / 4 / kThreads;
    float4 x[kCount];
    const auto row = [](int i) { return static_cast<int>(threadIdx.x + i * kThreads) / (kHeadDim / 4); };
    const int column = threadIdx.x % (kHeadDim / 4) * 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        x[i] = row(i) < head_dim && column < head_dim ? load4(weight + row(i) * head_dim + column) : float4{};
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        *reinterpret_cast<float4*>(FloatTile<kHeadDim>{shared}.at(row(i), column)) = make_float4(
            round_to_tf32(x[i].x), round_to_tf32(x[i].y), round_to_tf32(x[i].z), round_to_tf32(x[i].w));
}

template <class Traits>
__device__ inline void load_projections(const SummaryParams& p, typename Traits::Weights& weights) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    for (int branch = 0; branch < branches; ++branch) {
        const Projection& a = branch ? p.query_projection : p.key_projection;
        if constexpr (Traits::kKeepWeights) {
            if (a.dtype == DType::kFloat) {
                load_linear<Traits>(weights.weight[branch], static_cast<const float*>(a.weight), head_dim);
            } else {
                load_linear<Traits>(weights.weight[branch], static_cast<const S*>(a.weight), head_dim);
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
    weights.norm_bias[branch][i] = norm_bias;
}

// 16 rows of head_dim floats, of which `count` exist; row i is number row_of(first + i).
template <int kTiles, class RowOf>
__device__ inline void load_rows(float (&x)[kTiles][4], const void* rows, int first, int count, int head_dim,
                                 const RowOf& row_of) {
    const int group = threadIdx.x % kWarpSize / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float* const from =
            static_cast<const float*>(rows) + row_of(first + group + 8 * r) * head_dim + pair;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const bool exists = group + 8 * r < count && 8 * n < head_dim;
            const float2 y = exists ? *reinterpret_cast<const float2*>(from + 8 * n) : float2{};
            x[n][2 * r] = y.x;
            x[n][2 * r + 1] = y.y;
        }
    }
}

template <int kTiles>
__device__ inline void load_rows(float (&x)[kTiles][4], const void* rows, int first, int count,
                                 int head_dim) {
    load_rows(x, rows, first, count, head_dim, [](int row) { return int64_t{row}; });
}

// A step of eight of a product of 16 rows: its factors' columns 0 .. 7 come in the order 0, 2, 4, 6, 1, 3,
// 5, 7, in which a lane's numbers lie.
__device__ inline void multiply_add_step(float (&c)[4], const float (&a)[4], const float2& b) {
    const uint32_t factor[4] = {__float_as_uint(a[0]), __float_as_uint(a[2]), __float_as_uint(a[1]),
                                __float_as_uint(a[3])};
    multiply_add_tf32(c, factor, __float_as_uint(b.x), __float_as_uint(b.y));
}

// Keeps 16 rows, rounded, as a product's first factor.
template <int kTiles>
__device__ inline void store_factor(FloatTile<8 * kTiles> tile, int row, const float (&x)[kTiles][4]) {
    const int group = threadIdx.x % kWarpSize / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            tile.pair(row + group + 8 * r, 8 * n + pair) =
                make_float2(round_to_tf32(x[n][2 * r]), round_to_tf32(x[n][2 * r + 1]));
    __syncwarp();
}

// y += A W, or A W^T: 16 rows of `a` from `row` onward; W from `kept`, or where nothing is, from `weight`.
template <class Traits, bool kTransposed, class Weight>
__device__ inline void multiply_weight(float (&y)[Traits::kTiles][4], FloatTile<Traits::kHeadDim> a, int row,
                                       const float* kept, const Weight* weight, int head_dim) {
    constexpr int kHeadDim = Traits::kHeadDim, kTiles = Traits::kTiles;
    const FloatTile<kHeadDim> tile{const_cast<float*>(kept)};
    const int group = threadIdx.x % kWarpSize / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll 2
    for (int k = 0; k < kTiles; ++k) {
        const float2 upper = a.pair(row + group, 8 * k + pair), lower = a.pair(row + group + 8, 8 * k + pair);
        const float factor[4] = {upper.x, upper.y, lower.x, lower.y};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const int own = 8 * n + group, common = 8 * k + pair;
            float2 w{};
            if constexpr (Traits::kKeepWeights) {
                w = kTransposed ? tile.pair(own, common)
                                : make_float2(*tile.at(common, own), *tile.at(common + 1, own));
            } else if (8 * n < head_dim && 8 * k < head_dim) {
                const Weight* const from =
                    weight + (kTransposed ? own * head_dim + common : common * head_dim + own);
                w = make_float2(round_to_tf32(static_cast<float>(from[0])),
                                round_to_tf32(static_cast<float>(from[kTransposed ? 1 : head_dim])));
            }
            multiply_add_step(y[n], factor, w);
        }
    }
}
template <class Traits, bool kTransposed>
__device__ inline void multiply_weight(float (&y)[Traits::kTiles][4], FloatTile<Traits::kHeadDim> a, int row,
                                       const SummaryParams& p, const typename Traits::Weights& weights,
                                       int branch) {
    using S = typename Traits::S;
    const Projection& projection = branch ? p.query_projection : p.key_projection;
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const float* const kept = weights.weight[branch];
    if (Traits::kKeepWeights || projection.dtype == DType::kFloat) {
        multiply_weight<Traits, kTransposed>(y, a, row, kept, static_cast<const float*>(projection.weight),
                                             head_dim);
    } else {
        multiply_weight<Traits, kTransposed>(y, a, row, kept, static_cast<const S*>(projection.weight),
                                             head_dim);
    }
}

// Of 16 means the output of the Linear, normalised where there is a LayerNorm.
template <class Traits>
__device__ inline void project(float (&y)[Traits::kTiles][4], float (&rstd)[2],
                               FloatTile<Traits::kHeadDim> means, int row, const SummaryParams& p,
                               const typename Traits::Weights& weights, int branch) {
    constexpr int kTiles = Traits::kTiles;
    const int head_dim = static_cast<int>(p.shape.head_dim), pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[n][e] = weights.bias[branch][8 * n + pair + e % 2];
    multiply_weight<Traits, true>(y, means, row, p, weights, branch);
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
                y[n][e] = 8 * n < head_dim ? y[n][e] - center : 0.0f;
                variance += y[n][e] * y[n][e];
            }
        variance = quad_sum(variance) / head_dim;
        rstd[r] = 1.0f / sqrtf(variance + static_cast<float>(p.norm_eps));
#pragma unroll
        for (int n = 0; n < kTiles; ++n) y[n][2 * r] *= rstd[r], y[n][2 * r + 1] *= rstd[r];
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
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    chunk_omega_kernel(const __grid_constant__ SummaryParams p,
                       const __grid_constant__ SummaryGradPlan plan) {
    constexpr int kTiles = Traits::kTiles, kWarps = Traits::kWarps;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::OmegaShared*>(memory);
    auto& weights = shared.weights;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, pair = lane % 4 * 2;
    load_projections<Traits>(p, weights);
    sum_pieces<Traits::kThreads>(p, plan, p.grad_landmark_value);
    sum_pieces<Traits::kThreads>(p, plan, p.grad_landmark_key);
    __syncthreads();
    for (int first = 16 * (blockIdx.x * kWarps + warp); first < plan.total;
         first += 16 * gridDim.x * kWarps) {
        float omega[kTiles][4] = {};
        if (p.noise) load_rows(omega, p.noise, first, plan.total - first, head_dim);
        for (int branch = 0; branch < 2 && (!p.has_projection || p.has_query_projection); ++branch) {
            float y[kTiles][4], rstd[2];
            load_rows(y, branch ? p.query_mean : p.key_mean, first, plan.total - first, head_dim);
            if (branches > 0) {
                const FloatTile<Traits::kHeadDim> means{shared.mean[warp]};
                __syncwarp();
                store_factor(means, 0, y);
                project<Traits>(y, rstd, means, 0, p, weights, branch);
            }
            const float factor = static_cast<float>(p.mu_scale);
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int d = 8 * n + pair + e % 2;
                    omega[n][e] +=
                        factor * (y[n][e] * weights.norm_weight[branch][d] + weights.norm_bias[branch][d]);
                }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int chunk = first + group + 8 * r;
            if (chunk >= plan.total) continue;
            float* const to = static_cast<float*>(p.mu_rows) + int64_t{chunk} * head_dim + pair;
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
                if (8 * n < head_dim)
                    *reinterpret_cast<float2*>(to + 8 * n) =
                        make_float2(omega[n][2 * r], omega[n][2 * r + 1]);
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
    return index / 2 * 8 + lane % 4 * 2 + index % 2;
}

// From the gradients of landmark keys and of mu to those of the means and of the projections.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    chunk_projections_bwd_kernel(const __grid_constant__ SummaryParams p,
                                 const __grid_constant__ SummaryGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kTiles = Traits::kTiles, kSums = kTiles / 4;
    using RowTile = FloatTile<kHeadDim>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    const auto& weights = shared.weights;

    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, pair = lane % 4 * 2;
    const int branch = warp % 2, row = warp / 2 * 16; // first of the warp's chunks in a group of chunks
    const bool norm = has_norm(p, branch);
    load_projections<Traits>(p, shared.weights);
    __syncthreads();

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

    float grad_weight[Traits::kWeightTiles][kTiles][4] = {}, grad_bias[Traits::kWeightTiles][2] = {};
    float grad_norm_weight[kSums] = {}, grad_norm_bias[kSums] = {};
    for (int first = blockIdx.x * plan.group; first < plan.total; first += gridDim.x * plan.group) {
        const int count = min(plan.group, plan.total - first); // chunks of the group
        const int own = count - row;                           // the warp's among them, if positive
        const RowTile means{shared.mean[branch]}, grads{shared.grad_linear[branch]};
        if (row < Traits::kMaxChunks && (branch < branches || branches == 0)) {
            const int first_row = first + row;
            float hat[kTiles][4], rstd[2];
            if (branches > 0) {
                load_rows(hat, branch ? p.query_mean : p.key_mean, first_row, own, head_dim);
                store_factor(means, row, hat);
                project<Traits>(hat, rstd, means, row, p, weights, branch);
            }
            float grad[kTiles][4];
            load_rows(grad, p.mu_rows, first_row, own, head_dim);
            if (branch == 0) {
                float grad_key[kTiles][4];
                load_rows(grad_key, p.grad_landmark_key, first_row, own, head_dim,
                          [&](int chunk) { return landmark_row(p, plan, chunk); });
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) grad[n][e] += grad_key[n][e];
            }
            if (branches > 0) {
                if (norm) {
                    add_columns(grad_norm_bias, grad);
                    float product[kTiles][4];
#pragma unroll
                    for (int n = 0; n < kTiles; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) product[n][e] = grad[n][e] * hat[n][e];
                    add_columns(grad_norm_weight, product);
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float mean = 0, mean_hat = 0;
#pragma unroll
                        for (int n = 0; n < kTiles; ++n)
#pragma unroll
                            for (int e = 2 * r; e < 2 * r + 2; ++e) {
                                grad[n][e] *= weights.norm_weight[branch][8 * n + pair + e % 2];
                                mean += grad[n][e];
                                mean_hat += grad[n][e] * hat[n][e];
                            }
                        mean = quad_sum(mean) / head_dim;
                        mean_hat = quad_sum(mean_hat) / head_dim;
#pragma unroll
                        for (int n = 0; n < kTiles; ++n)
#pragma unroll
                            for (int e = 2 * r; e < 2 * r + 2; ++e)
                                grad[n][e] = 8 * n < head_dim && group + 8 * r < own
                                                 ? (grad[n][e] - mean - hat[n][e] * mean_hat) * rstd[r]
                                                 : 0.0f;
                    }
                }
                // Now the gradient of the Linear's output; then that of the means.
                store_factor(grads, row, grad);
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) grad[n][e] = 0;
                multiply_weight<Traits, false>(grad, grads, row, p, weights, branch);
            }
            S* const out = static_cast<S*>(branch ? p.grad_query_mean : p.grad_key_mean);
            int divisor[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) divisor[r] = divisor_of(first + row + group + 8 * r);
            for (int i = 0; counts_padding && i < min(own, 16); ++i) {
                const int padding = count_padding(first + row + i);
                if (i == group) divisor[0] -= padding;
                if (i == group + 8) divisor[1] -= padding;
            }
            const float factor[2] = {1.0f / static_cast<float>(max(divisor[0], 1)),
                                     1.0f / static_cast<float>(max(divisor[1], 1))};
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                if (8 * n >= head_dim) continue;
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    if (group + 8 * r < own)
                        *reinterpret_cast<uint32_t*>(out + int64_t{first_row + group + 8 * r} * head_dim +
                                                     8 * n + pair) =
                            pack<S>(factor[r] * grad[n][2 * r], factor[r] * grad[n][2 * r + 1]);
            }
        }
        if (branches == 0) continue;
        __syncthreads();
        // Gradient of the Linear's weight and bias.
#pragma unroll
        for (int t = 0; t < Traits::kWeightTiles; ++t) {
            const int tile = warp * Traits::kWeightTiles + t;
            const int branch = tile / (kHeadDim / 16), out_row = tile % (kHeadDim / 16) * 16;
            if (branch >= branches) continue;
            const RowTile means{shared.mean[branch]}, grads{shared.grad_linear[branch]};
#pragma unroll 1
            for (int k = 0; k < count; k += 8) {
                const float a[4] = {
                    *grads.at(k + pair, out_row + group), *grads.at(k + pair + 1, out_row + group),
                    *grads.at(k + pair, out_row + group + 8), *grads.at(k + pair + 1, out_row + group + 8)};
                grad_bias[t][0] += a[0] + a[1];
                grad_bias[t][1] += a[2] + a[3];
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
                    multiply_add_step(grad_weight[t][n], a,
                                      make_float2(*means.at(k + pair, 8 * n + group),
                                                  *means.at(k + pair + 1, 8 * n + group)));
            }
        }
        __syncthreads();
    }

    if (branches == 0) return;
    // Of a projection: the Linear's weight [D, D], its bias, the LayerNorm's weight and bias.
    const int size = (head_dim + 3) * head_dim;
    float* const out = static_cast<float*>(p.grad_projections) + int64_t{blockIdx.x} * 2 * size;
#pragma unroll
    for (int t = 0; t < Traits::kWeightTiles; ++t) {
        const int tile = warp * Traits::kWeightTiles + t;
        const int branch = tile / (kHeadDim / 16), out_row = tile % (kHeadDim / 16) * 16;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int o = out_row + group + 8 * r;
            const float bias = quad_sum(grad_bias[t][r]);
            if (o >= head_dim) continue;
            if (pair == 0) out[branch * size + head_dim * head_dim + o] = bias;
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
                if (8 * n < head_dim)
                    *reinterpret_cast<float2*>(out + branch * size + o * head_dim + 8 * n + pair) =
                        make_float2(grad_weight[t][n][2 * r], grad_weight[t][n][2 * r + 1]);
        }
    }
    // LayerNorm: [weight or bias][branch][row tile][column].
    float* const sums = shared.mean[0];
    constexpr int kRowTiles = Traits::kRowTiles;
    if (row < Traits::kMaxChunks) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            const int at = (branch * kRowTiles + row / 16) * kHeadDim + summed_column<kTiles>(i);
            sums[at] = grad_norm_weight[i];
            sums[at + 2 * kRowTiles * kHeadDim] = grad_norm_bias[i];
        }
    }
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
            detail::ceil_div(plan.total * p.shape.head_dim, 8 * Projections::kThreads);
        cudaFuncSetAttribute(chunk_omega_kernel<Projections>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kOmegaBytes);
        cudaFuncSetAttribute(chunk_projections_bwd_kernel<Projections>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
        chunk_omega_kernel<Projections>
            <<<static_cast<unsigned>(detail::min(omega_blocks, 132 * Projections::kCtasPerSm)),
               Projections::kThreads, kOmegaBytes, stream>>>(p, plan);
        chunk_tokens_bwd_kernel<Tokens>
            <<<static_cast<unsigned>(detail::ceil_div(plan.total, chunks_per_block)), Tokens::kThreads, 0,
               stream>>>(p, plan);
        chunk_projections_bwd_kernel<Projections>
            <<<projection_blocks, Projections::kThreads, kBytes, stream>>>(p, plan);
    }
}

} // namespace eva_attn::cuda::mma
