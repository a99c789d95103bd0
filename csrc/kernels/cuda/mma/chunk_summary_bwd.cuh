// Backward of the summaries, in three kernels: omega again; from the gradients of landmark values to what
// each token needs of its chunk and to the gradient of omega; then through the projections.
#pragma once

#include "kernels/cuda/mma/bwd_utils.cuh"

namespace eva_attn::cuda::mma {

template <class S>
__device__ inline float parameter(const Projection& a, const void* data, int i) {
    if (a.dtype == DType::kFloat) return static_cast<const float*>(data)[i];
    return static_cast<float>(static_cast<const S*>(data)[i]);
}
template <class S>
__device__ inline float4 load_parameters(const Projection& a, const void* data, int i) {
    if (a.dtype == DType::kFloat)
        return *reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
    const uint2 packed = *reinterpret_cast<const uint2*>(static_cast<const S*>(data) + i);
    const float2 low = unpack<S>(packed.x), high = unpack<S>(packed.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

// The means of up to kMaxChunks chunks go through the projections together.
template <class S_, int kHeadDim_>
struct ProjectionTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
    static constexpr int kCtasPerSm = kHeadDim == 64 ? 2 : 1;
    static constexpr int kMaxChunks = kHeadDim == 64 ? 32 : 16;
    static constexpr int kUnits = kHeadDim / 8;
    static constexpr int kLd = kHeadDim + 4;
    static constexpr bool kKeepWeights = kHeadDim == 64; // in shared memory
    // Gradient of a Linear's weight: 16 rows of it make a tile.
    static constexpr int kWeightTiles = 2 * kHeadDim / 16 / kWarps;

    using Matrix = float[kMaxChunks][kLd];
    struct Shared {
        // Of the key's projection, of the query's. Factors of products are rounded to tf32.
        float weight[2][kKeepWeights ? kHeadDim : 1][kLd];
        float bias[2][kHeadDim], norm_weight[2][kHeadDim], norm_bias[2][kHeadDim];
        Matrix mean[2];
        Matrix hat[2];      // (normalised) output of the Linear, then the gradient of that output
        Matrix grad_out[2]; // gradient of the landmarks
        float rstd[2][kMaxChunks];
        float inverse_divisor[kMaxChunks];
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

template <class Traits>
__device__ inline void load_projections(const SummaryParams& p, typename Traits::Shared& shared) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    for (int branch = 0; branch < 2; ++branch) {
        const Projection& a = branch ? p.query_projection : p.key_projection;
        const bool present = branch < branches;
#pragma unroll 4
        for (int i = threadIdx.x; Traits::kKeepWeights && i < kHeadDim * kHeadDim / 4; i += kThreads) {
            const int row = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
            const bool inside = present && row < head_dim && column < head_dim;
            const float4 x = inside ? load_parameters<S>(a, a.weight, row * head_dim + column) : float4{};
            *reinterpret_cast<float4*>(&shared.weight[branch][row][column]) =
                make_float4(round_to_tf32(x.x), round_to_tf32(x.y), round_to_tf32(x.z), round_to_tf32(x.w));
        }
        for (int i = threadIdx.x; i < kHeadDim; i += kThreads) {
            const bool inside = present && i < head_dim;
            shared.bias[branch][i] = inside && a.bias ? parameter<S>(a, a.bias, i) : 0.0f;
            shared.norm_weight[branch][i] =
                inside && a.norm_weight ? parameter<S>(a, a.norm_weight, i) : 1.0f;
            shared.norm_bias[branch][i] = inside && a.norm_bias ? parameter<S>(a, a.norm_bias, i) : 0.0f;
        }
    }
}

// An element of the weight of a Linear that is present.
template <class Traits>
__device__ inline uint32_t linear_weight(const SummaryParams& p, const typename Traits::Shared& shared,
                                         int branch, int row, int column) {
    if constexpr (Traits::kKeepWeights) {
        return __float_as_uint(shared.weight[branch][row][column]);
    } else {
        const Projection& a = branch ? p.query_projection : p.key_projection;
        const int head_dim = static_cast<int>(p.shape.head_dim);
        const bool inside = row < head_dim && column < head_dim;
        const float x = inside ? parameter<typename Traits::S>(a, a.weight, row * head_dim + column) : 0.0f;
        return __float_as_uint(round_to_tf32(x));
    }
}

// Means, then the output of the Linear, normalised where there is a LayerNorm (without projection: the
// means), of `count` chunks from `first` onward.
template <class Traits>
__device__ inline void project_means(const SummaryParams& p, int first, int count,
                                     typename Traits::Shared& shared) {
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads, kUnits = Traits::kUnits,
                  kLd = Traits::kLd;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    const bool has_mu = !p.has_projection || p.has_query_projection;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, quad = lane % 4, pair = 2 * quad;
    for (int i = threadIdx.x; i < 2 * Traits::kMaxChunks * kUnits; i += kThreads) {
        const int branch = i / (Traits::kMaxChunks * kUnits);
        const int chunk = i / kUnits % Traits::kMaxChunks, column = i % kUnits * 8;
        const void* const from = branch ? p.query_mean : p.key_mean;
        float x[8] = {};
        if (chunk < count && column < head_dim && (branch == 0 || has_mu))
            load_floats(x, static_cast<const float*>(from) + int64_t{first + chunk} * head_dim + column);
        if (branches == 0) store_floats(&shared.hat[branch][chunk][column], x);
#pragma unroll
        for (int d = 0; d < 8; ++d) x[d] = round_to_tf32(x[d]);
        store_floats(&shared.mean[branch][chunk][column], x);
    }
    __syncthreads();

    // A warp projects 16 means.
    const int branch = warp % 2, row = warp / 2 * 16;
    const bool projects = branch < branches && row < count;
    if (projects) {
        float linear[kHeadDim / 8][4] = {};
#pragma unroll 4
        for (int k = 0; k < kHeadDim; k += 8) {
            const float* const upper = &shared.mean[branch][row + group][k + quad];
            const float* const lower = upper + 8 * kLd;
            const uint32_t a[4] = {__float_as_uint(upper[0]), __float_as_uint(lower[0]),
                                   __float_as_uint(upper[4]), __float_as_uint(lower[4])};
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n) {
                multiply_add_tf32(linear[n], a,
                                  linear_weight<Traits>(p, shared, branch, 8 * n + group, k + quad),
                                  linear_weight<Traits>(p, shared, branch, 8 * n + group, k + quad + 4));
            }
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) linear[n][e] += shared.bias[branch][8 * n + pair + e % 2];
        if (has_norm(p, branch)) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float center = 0, variance = 0;
#pragma unroll
                for (int n = 0; n < kHeadDim / 8; ++n) center += linear[n][2 * r] + linear[n][2 * r + 1];
                center = quad_sum(center) / head_dim;
#pragma unroll
                for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e) {
                        linear[n][e] = 8 * n < head_dim ? linear[n][e] - center : 0.0f;
                        variance += linear[n][e] * linear[n][e];
                    }
                variance = quad_sum(variance) / head_dim;
                const float rstd = 1.0f / sqrtf(variance + static_cast<float>(p.norm_eps));
                if (quad == 0) shared.rstd[branch][row + group + 8 * r] = rstd;
#pragma unroll
                for (int n = 0; n < kHeadDim / 8; ++n) linear[n][2 * r] *= rstd, linear[n][2 * r + 1] *= rstd;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n)
                *reinterpret_cast<float2*>(&shared.hat[branch][row + group + 8 * r][8 * n + pair]) =
                    make_float2(linear[n][2 * r], linear[n][2 * r + 1]);
    }
    __syncthreads();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    chunk_omega_kernel(const __grid_constant__ SummaryParams p,
                       const __grid_constant__ SummaryGradPlan plan) {
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const bool has_mu = !p.has_projection || p.has_query_projection;
    load_projections<Traits>(p, shared);
    for (int first = blockIdx.x * plan.group; first < plan.total; first += gridDim.x * plan.group) {
        const int count = min(plan.group, plan.total - first);
        __syncthreads();
        project_means<Traits>(p, first, count, shared);
        for (int i = threadIdx.x; i < count * kHeadDim; i += kThreads) {
            const int chunk = i / kHeadDim, d = i % kHeadDim;
            if (d >= head_dim) continue;
            const int64_t at = int64_t{first + chunk} * head_dim + d;
            float x = 0;
            if (has_mu)
                x = static_cast<float>(p.mu_scale) *
                    (shared.hat[0][chunk][d] * shared.norm_weight[0][d] + shared.norm_bias[0][d] +
                     shared.hat[1][chunk][d] * shared.norm_weight[1][d] + shared.norm_bias[1][d]);
            if (p.noise) x += static_cast<const float*>(p.noise)[at];
            static_cast<float*>(p.omega)[at] = x;
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
    static constexpr int kUnroll = 4; // tokens of a group whose loads are under way together
    static_assert(kUnits % kUnroll == 0);

    struct Part { // what one warp saw of a chunk
        float maximum, sum, sum_g, unused;
        float sum_gk[kHeadDim], sum_k[kHeadDim];
    };
};

// grad_beta, token_weight, token_grad, chunk_stats; in grad_query_mean the gradient of mu's two terms.
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
    uint4 key_row[kUnroll], value_row[kUnroll];
    bool valid[kUnroll];
    const auto load = [&](int pass) {
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
            const int token = token_of(pass + j);
            valid[j] = token >= 0 && !(mask && mask[token]);
            key_row[j] = value_row[j] = uint4{};
            if (valid[j] && in_row) {
                key_row[j] = *reinterpret_cast<const uint4*>(keys + int64_t{token} * key_stride);
                value_row[j] = *reinterpret_cast<const uint4*>(values + int64_t{token} * value_stride);
            }
        }
    };
    load(0);
    float omega[8] = {}, grad_beta[8] = {};
    if (in_row) {
        load_floats(omega, static_cast<const float*>(p.omega) + row);
        const float* from = static_cast<const float*>(p.grad_landmark_value) +
                            (bh * p.pieces * p.global_columns + within) * head_dim + column;
#pragma unroll 4
        for (int piece = 0; piece < static_cast<int>(p.pieces); ++piece) {
            float x[8];
            load_floats(x, from);
#pragma unroll
            for (int d = 0; d < 8; ++d) grad_beta[d] += x[d];
            from += p.global_columns * head_dim;
        }
        if (own_part == 0) store_floats(static_cast<float*>(p.grad_beta) + row, grad_beta);
    }

    // kUnits passes make a batch: each lane keeps the logit and g of one of its group's tokens; if there is
    // another batch, it leaves both where the token's results will stand.
    ChunkSoftmax softmax;
    float kept_logit = -kInfinity, kept_g = 0;
    const bool one_batch = plan.passes <= kUnits;
    for (int pass = 0; pass < plan.passes; pass += kUnroll) {
        if (pass > 0) load(pass);
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
    store_floats(static_cast<float*>(p.grad_query_mean) + row, grad_mu);
    if (unit != 0) return;
    float* const stats = static_cast<float*>(p.chunk_stats) + 2 * int64_t{index};
    stats[0] = softmax.sum > 0 ? (softmax.maximum + log2f(softmax.sum)) * kLn2 : 0.0f;
    stats[1] = mean_g;
}

// From the gradients of landmark keys and of mu to those of the means and of the projections.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    chunk_projections_bwd_kernel(const __grid_constant__ SummaryParams p,
                                 const __grid_constant__ SummaryGradPlan plan) {
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads, kWarps = Traits::kWarps,
                  kUnits = Traits::kUnits, kLd = Traits::kLd;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);

    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim), branches = count_branches(p);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, quad = lane % 4, pair = 2 * quad;
    load_projections<Traits>(p, shared);

    float grad_weight[Traits::kWeightTiles][kHeadDim / 8][4] = {};
    // Of the column threadIdx.x % kHeadDim of projection threadIdx.x / kHeadDim.
    float grad_bias = 0, grad_norm_weight = 0, grad_norm_bias = 0;
    const bool owns_column = threadIdx.x < 2 * kHeadDim;
    const int own_branch = threadIdx.x / kHeadDim % 2, own_column = threadIdx.x % kHeadDim;

    for (int first = blockIdx.x * plan.group; first < plan.total; first += gridDim.x * plan.group) {
        const int count = min(plan.group, plan.total - first);
        __syncthreads();
        for (int chunk = warp; chunk < count; chunk += kWarps) {
            const int bh = (first + chunk) / plan.chunks, within = first + chunk - bh * plan.chunks;
            const TokenBox box = plan.box(g, within);
            int members = min(plan.chunk.height, box.grid_height - box.y0) *
                          min(plan.chunk.width, box.grid_width - box.x0);
            if (p.key_padding_mask) {
                const bool* const mask =
                    p.key_padding_mask + bh / static_cast<int>(p.shape.heads) * g.num_tokens();
                members = 0;
                for (int i = lane; i < plan.chunk.size(); i += kWarpSize) {
                    const int token = box.token(i);
                    members += token >= 0 && !mask[token];
                }
                members = __reduce_add_sync(0xffffffffu, members);
            }
            if (lane == 0)
                shared.inverse_divisor[chunk] =
                    1.0f / static_cast<float>(p.mean_divisor ? p.mean_divisor : max(members, 1));
        }
        for (int i = threadIdx.x; i < count * kUnits; i += kThreads) {
            const int chunk = i / kUnits, column = i % kUnits * 8;
            float grad_mu[8] = {}, grad_key[8] = {};
            if (column < head_dim) {
                load_floats(grad_mu, static_cast<const float*>(p.grad_query_mean) +
                                         int64_t{first + chunk} * head_dim + column);
                const int bh = (first + chunk) / plan.chunks, within = first + chunk - bh * plan.chunks;
                const float* from = static_cast<const float*>(p.grad_landmark_key) +
                                    (bh * p.pieces * p.global_columns + within) * head_dim + column;
#pragma unroll 4
                for (int piece = 0; piece < static_cast<int>(p.pieces); ++piece) {
                    float x[8];
                    load_floats(x, from);
#pragma unroll
                    for (int d = 0; d < 8; ++d) grad_key[d] += x[d];
                    from += p.global_columns * head_dim;
                }
            }
#pragma unroll
            for (int d = 0; d < 8; ++d) grad_key[d] += grad_mu[d];
            store_floats(&shared.grad_out[0][chunk][column], grad_key);
            store_floats(&shared.grad_out[1][chunk][column], grad_mu);
        }
        project_means<Traits>(p, first, count, shared);
        if (branches == 0) {
            for (int i = threadIdx.x; i < count * head_dim; i += kThreads) {
                const int chunk = i / head_dim, d = i % head_dim;
                const int64_t at = int64_t{first} * head_dim + i;
                static_cast<float*>(p.grad_key_mean)[at] =
                    shared.grad_out[0][chunk][d] * shared.inverse_divisor[chunk];
                static_cast<float*>(p.grad_query_mean)[at] =
                    shared.grad_out[1][chunk][d] * shared.inverse_divisor[chunk];
            }
            continue;
        }
        if (owns_column && own_branch < branches && has_norm(p, own_branch)) {
#pragma unroll 4
            for (int chunk = 0; chunk < count; ++chunk) {
                const float grad = shared.grad_out[own_branch][chunk][own_column];
                grad_norm_weight += grad * shared.hat[own_branch][chunk][own_column];
                grad_norm_bias += grad;
            }
        }
        __syncthreads();
        // To the gradient of the Linear's output, zeros in the rows behind the last chunk.
        const int branch = warp % 2, row = warp / 2 * 16;
        if (branch < branches && row < count) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int chunk = row + group + 8 * r;
                const float* const grad = shared.grad_out[branch][chunk];
                float* const hat = shared.hat[branch][chunk];
                const float* const weight = shared.norm_weight[branch];
                float mean = 0, mean_hat = 0;
#pragma unroll
                for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int d = 8 * n + pair + e;
                        mean += grad[d] * weight[d];
                        mean_hat += grad[d] * weight[d] * hat[d];
                    }
                mean = quad_sum(mean) / head_dim;
                mean_hat = quad_sum(mean_hat) / head_dim;
                const float rstd = shared.rstd[branch][chunk];
#pragma unroll
                for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int d = 8 * n + pair + e;
                        float x = grad[d];
                        if (has_norm(p, branch)) x = (x * weight[d] - mean - hat[d] * mean_hat) * rstd;
                        hat[d] = chunk < count && d < head_dim ? round_to_tf32(x) : 0.0f;
                    }
            }
        }
        __syncthreads();

        auto& grad_linear = shared.hat;
        if (owns_column && own_branch < branches)
#pragma unroll 4
            for (int chunk = 0; chunk < count; ++chunk)
                grad_bias += grad_linear[own_branch][chunk][own_column];
        // Gradient of the mean: a warp takes 16 chunks and half of the columns.
        {
            constexpr int kHalf = kHeadDim / 16;
            const int rows = warp / 4 * 16, half = warp / 2 % 2;
            const int branch = warp % 2;
            if (rows < count && branch < branches) {
                float grad_mean[kHalf][4] = {};
#pragma unroll 4
                for (int k = 0; k < kHeadDim; k += 8) {
                    const float* const upper = &grad_linear[branch][rows + group][k + quad];
                    const float* const lower = upper + 8 * kLd;
                    const uint32_t a[4] = {__float_as_uint(upper[0]), __float_as_uint(lower[0]),
                                           __float_as_uint(upper[4]), __float_as_uint(lower[4])};
#pragma unroll
                    for (int n = 0; n < kHalf; ++n) {
                        const int d = (half * kHalf + n) * 8 + group;
                        multiply_add_tf32(grad_mean[n], a,
                                          linear_weight<Traits>(p, shared, branch, k + quad, d),
                                          linear_weight<Traits>(p, shared, branch, k + quad + 4, d));
                    }
                }
                float* const out = static_cast<float*>(branch ? p.grad_query_mean : p.grad_key_mean);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int chunk = rows + group + 8 * r;
                    if (chunk >= count) continue;
                    const float factor = shared.inverse_divisor[chunk];
#pragma unroll
                    for (int n = 0; n < kHalf; ++n) {
                        const int d = (half * kHalf + n) * 8 + pair;
                        if (d < head_dim)
                            *reinterpret_cast<float2*>(out + int64_t{first + chunk} * head_dim + d) =
                                make_float2(factor * grad_mean[n][2 * r], factor * grad_mean[n][2 * r + 1]);
                    }
                }
            }
        }
        // Gradient of the Linear's weight.
#pragma unroll
        for (int t = 0; t < Traits::kWeightTiles; ++t) {
            const int tile = warp * Traits::kWeightTiles + t;
            const int branch = tile / (kHeadDim / 16), out_row = tile % (kHeadDim / 16) * 16;
            if (branch >= branches) continue;
#pragma unroll 1
            for (int k = 0; k < count; k += 8) {
                const float* const upper = &grad_linear[branch][k + quad][out_row + group];
                const float* const lower = upper + 4 * kLd;
                const uint32_t a[4] = {__float_as_uint(upper[0]), __float_as_uint(upper[8]),
                                       __float_as_uint(lower[0]), __float_as_uint(lower[8])};
#pragma unroll
                for (int n = 0; n < kHeadDim / 8; ++n) {
                    const float* const mean = &shared.mean[branch][k + quad][8 * n + group];
                    multiply_add_tf32(grad_weight[t][n], a, __float_as_uint(mean[0]),
                                      __float_as_uint(mean[4 * kLd]));
                }
            }
        }
    }

    if (branches == 0) return;
    float* const out =
        static_cast<float*>(p.grad_projections) + int64_t{blockIdx.x} * 2 * (head_dim + 3) * head_dim;
#pragma unroll
    for (int t = 0; t < Traits::kWeightTiles; ++t) {
        const int tile = warp * Traits::kWeightTiles + t;
        const int branch = tile / (kHeadDim / 16), out_row = tile % (kHeadDim / 16) * 16;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n) {
                const int o = out_row + group + 8 * r, d = 8 * n + pair;
                if (o < head_dim && d < head_dim)
                    *reinterpret_cast<float2*>(out + (branch * (head_dim + 3) + o) * head_dim + d) =
                        make_float2(grad_weight[t][n][2 * r], grad_weight[t][n][2 * r + 1]);
            }
    }
    if (!owns_column || own_column >= head_dim) return;
    float* const vectors = out + (own_branch * (head_dim + 3) + head_dim) * head_dim + own_column;
    vectors[0] = grad_bias;
    vectors[head_dim] = grad_norm_weight;
    vectors[2 * head_dim] = grad_norm_bias;
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
        constexpr int kBytes = sizeof(typename Projections::Shared);
        const int projection_blocks = count_projection_blocks<Projections>(plan);
        const int chunks_per_block = Tokens::kGroups >> plan.parts_log2;
        for (const auto kernel : {chunk_omega_kernel<Projections>, chunk_projections_bwd_kernel<Projections>})
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
        chunk_omega_kernel<Projections>
            <<<projection_blocks, Projections::kThreads, kBytes, stream>>>(p, plan);
        chunk_tokens_bwd_kernel<Tokens>
            <<<static_cast<unsigned>(detail::ceil_div(plan.total, chunks_per_block)), Tokens::kThreads, 0,
               stream>>>(p, plan);
        chunk_projections_bwd_kernel<Projections>
            <<<projection_blocks, Projections::kThreads, kBytes, stream>>>(p, plan);
    }
}

} // namespace eva_attn::cuda::mma
