// Backward of the summaries, in three kernels: omega again, and the sums of the landmark gradients' pieces;
// from the gradients of landmark values to what each token needs of its chunk and to the gradient of omega;
// then through the projections.
#pragma once

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/projection.cuh"

namespace eva_attn::cuda::mma {

// In products a warp takes 16 columns of up to kMaxChunks rows, one a chunk; between them kLanes lanes take
// a row.
template <class S_, int kHeadDim_>
struct ProjectionTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kLanes = kHeadDim / 8, kParts = kHeadDim / 16;
    using Weights = ProjectionWeights<kHeadDim>;

    // One projection's gradients.
    static constexpr int kWarps = kParts, kThreads = kWarps * kWarpSize;
    static constexpr int kRowTiles = kHeadDim == 64 ? 2 : 1, kMaxChunks = 16 * kRowTiles;
    static constexpr int kCtasPerSm = kHeadDim == 64 ? 4 : 2;
    static_assert(kThreads / kLanes == 16);
    struct Shared {
        Weights weights;
        alignas(4 * kHeadDim) __nv_bfloat16 mean[kMaxChunks * 2 * kHeadDim];
        __nv_bfloat16 grad[kMaxChunks * 2 * kHeadDim]; // of the Linear's output, which it held before
        float factor[kMaxChunks];                      // from gradients of means to those of tokens
        uint4 stage[kRowTiles][2][2][kThreads];        // means, gradients of mu
    };
    static_assert(kWarps * kHeadDim * sizeof(float) <= sizeof(Shared::stage));

    // omega: the projections side by side or, to save space, in turn.
    static constexpr int kSides = kHeadDim == 64 ? 2 : 1;
    static constexpr int kOmegaThreads = kSides * kParts * kWarpSize;
    static constexpr int kOmegaRowTiles = 2, kOmegaChunks = 16 * kOmegaRowTiles;
    static constexpr int kOmegaCtasPerSm = kHeadDim == 64 ? 3 : 2;
    struct OmegaShared {
        Weights weights[kSides];
        alignas(4 * kHeadDim) __nv_bfloat16 mean[kSides][kOmegaChunks * 2 * kHeadDim];
        __nv_bfloat16 output[kSides][kOmegaChunks * 2 * kHeadDim];
    };
};

struct SummaryGradPlan {
    BoxShape chunk;
    int chunks, columns; // per (batch, head), and per row of chunks
    int total;           // chunks in all
    int parts_log2;      // groups of lanes that share a chunk
    int passes;          // tokens that each of them takes
    int group;           // chunks that go through the projections together
    int divisor;         // of all chunks' means; 0: to be counted
    int omega_blocks;    // beside those that sum pieces

    __device__ TokenBox box(const Geometry& g, int chunk_index) const {
        const int y = static_cast<unsigned>(chunk_index) / static_cast<unsigned>(columns);
        return TokenBox{
            .shape = chunk,
            .y0 = y * chunk.height,
            .x0 = (chunk_index - y * columns) * chunk.width,
            .grid_height = static_cast<int>(g.grid_height),
            .grid_width = static_cast<int>(g.grid_width),
            .num_prefix_tokens = static_cast<int>(g.num_prefix_tokens),
        };
    }
};

// Of the means. The key's is branch 0, the query's 1.
__host__ __device__ inline int count_projected(const SummaryParams& p) {
    return p.has_projection && !p.has_query_projection ? 1 : 2;
}

// The row that a chunk has in the landmark gradients' first pieces.
__device__ inline int64_t landmark_row(const SummaryParams& p, const SummaryGradPlan& plan, int chunk,
                                       int bh) {
    return chunk + bh * (p.pieces * p.global_columns - plan.chunks);
}
__device__ inline int64_t landmark_row(const SummaryParams& p, const SummaryGradPlan& plan, int chunk) {
    const int64_t between = p.pieces * p.global_columns - plan.chunks; // two heads
    return between == 0 ? chunk : chunk + chunk / plan.chunks * between;
}
// Its columns from `column` on.
template <class S>
__device__ inline const char* gradient_columns(const SummaryParams& p, const void* pieces, int64_t row,
                                               int column) {
    const int64_t at = row * static_cast<int>(p.shape.head_dim) + column;
    return static_cast<const char*>(pieces) + at * (p.rounded_gradients ? sizeof(S) : sizeof(float));
}
// Eight of them, of the first piece.
template <class S>
__device__ inline Float8 load_first_piece(const SummaryParams& p, const char* from) {
    return p.rounded_gradients ? unpack8<S>(*reinterpret_cast<const uint4*>(from))
                               : load8(reinterpret_cast<const float*>(from));
}
// ... and with all pieces added up.
template <class S>
__device__ inline Float8 load_pieces(const SummaryParams& p, const char* from) {
    Float8 sum = load_first_piece<S>(p, from);
#pragma unroll 1
    for (int piece = 1; piece < static_cast<int>(p.pieces); ++piece) {
        from += p.global_columns * p.shape.head_dim * sizeof(float);
        const Float8 x = load8(reinterpret_cast<const float*>(from));
#pragma unroll
        for (int i = 0; i < 8; ++i) sum.x[i] += x.x[i];
    }
    return sum;
}

// Adds the pieces of the landmark gradients to the first, four columns a thread.
template <int kThreads>
__device__ inline void sum_pieces(const SummaryParams& p, const SummaryGradPlan& plan, int block,
                                  int blocks) {
    const int head_dim = static_cast<int>(p.shape.head_dim), lanes = head_dim / 4;
    const int64_t stride = p.global_columns * head_dim, count = int64_t{plan.total} * lanes;
    for (int64_t i = int64_t{block} * kThreads + threadIdx.x; i < 2 * count;
         i += int64_t{blocks} * kThreads) {
        void* const pieces = i < count ? p.grad_landmark_value : p.grad_landmark_key;
        const int64_t at = i < count ? i : i - count;
        const int chunk = static_cast<int>(at / lanes), column = static_cast<int>(at % lanes) * 4;
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

// omega, in omega_rows, and the sums of the landmark gradients' pieces.
template <class Traits>
__global__ void __launch_bounds__(Traits::kOmegaThreads, Traits::kOmegaCtasPerSm)
    chunk_omega_kernel(const __grid_constant__ SummaryParams p,
                       const __grid_constant__ SummaryGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kLanes = Traits::kLanes, kSides = Traits::kSides,
                  kThreads = Traits::kOmegaThreads, kChunks = Traits::kOmegaChunks;
    constexpr int kGroups = kThreads / kLanes, kRows = kChunks / kGroups; // a thread's
    wait_for_dependencies();
    if (static_cast<int>(blockIdx.x) >= plan.omega_blocks)
        return sum_pieces<kThreads>(p, plan, blockIdx.x - plan.omega_blocks, gridDim.x - plan.omega_blocks);
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::OmegaShared*>(memory);
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const bool has_mu = !p.has_projection || p.has_query_projection;
    const int warp = threadIdx.x / kWarpSize, side = warp / Traits::kParts;
    const int first_column = warp % Traits::kParts * 16;
    const int group = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 8;
    const bool inside = column < head_dim;
    const float reciprocal_dim = 1.0f / static_cast<float>(head_dim);
    const auto projection = [&](int branch) -> const Projection& {
        return branch ? p.query_projection : p.key_projection;
    };
    const auto rows_of = [](__nv_bfloat16* data) { return SplitRows<kHeadDim>{{data}}; };

    Float8 mean[kSides][kRows];
    const auto load = [&](int first, int branch) {
#pragma unroll
        for (int s = 0; s < kSides; ++s)
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int chunk = first + group + r * kGroups;
                const auto* from = static_cast<const float*>(branch + s ? p.query_mean : p.key_mean);
                mean[s][r] = chunk < plan.total && inside ? load8(from + int64_t{chunk} * head_dim + column)
                                                          : Float8{};
            }
    };
    const int step = kChunks * plan.omega_blocks;
    if (has_mu) load(kChunks * blockIdx.x, 0);
    if (kSides == 2 && p.has_query_projection)
        for (int s = 0; s < kSides; ++s)
            shared.weights[s].template load<S, kThreads>(projection(s), head_dim);
    for (int first = kChunks * blockIdx.x; first < plan.total; first += step) {
        Float8 omega[kRows] = {};
        for (int branch = 0; has_mu && branch < 2; branch += kSides) {
            Float8 y[kSides][kRows];
            if (p.has_projection) {
                if (kSides == 1) shared.weights[0].template load<S, kThreads>(projection(branch), head_dim);
#pragma unroll
                for (int s = 0; s < kSides; ++s)
#pragma unroll
                    for (int r = 0; r < kRows; ++r)
                        rows_of(shared.mean[s]).store(group + r * kGroups, column, mean[s][r]);
            } else {
#pragma unroll
                for (int s = 0; s < kSides; ++s)
#pragma unroll
                    for (int r = 0; r < kRows; ++r) y[s][r] = mean[s][r];
            }
            const bool last = branch + kSides == 2;
            load(last ? first + step : first, last ? 0 : branch + kSides);
            if (p.has_projection) {
                __syncthreads();
                float product[Traits::kOmegaRowTiles][2][4];
                multiply_weight<true>(product, rows_of(shared.mean[side]), shared.weights[side].linear(),
                                      first_column);
                store_product(rows_of(shared.output[side]), product, first_column);
                __syncthreads();
#pragma unroll
                for (int s = 0; s < kSides; ++s) {
                    const bool norm = projection(branch + s).norm_weight != nullptr;
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        y[s][r] = rows_of(shared.output[s]).load_floats(group + r * kGroups, column);
                        shared.weights[s].template finish<kLanes>(y[s][r], column, inside, reciprocal_dim,
                                                                  static_cast<float>(p.norm_eps), norm);
                    }
                }
                // The weights are about to be replaced.
                if (kSides == 1) __syncthreads();
            }
#pragma unroll
            for (int s = 0; s < kSides; ++s)
#pragma unroll
                for (int r = 0; r < kRows; ++r)
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        omega[r].x[i] += static_cast<float>(p.mu_scale) * y[s][r].x[i];
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int chunk = first + group + r * kGroups;
            if (chunk >= plan.total || !inside) continue;
            const int64_t at = int64_t{chunk} * head_dim + column;
            if (p.noise) {
                const Float8 noise = load8(static_cast<const float*>(p.noise) + at);
#pragma unroll
                for (int i = 0; i < 8; ++i) omega[r].x[i] += noise.x[i];
            }
            *reinterpret_cast<Float8*>(static_cast<float*>(p.omega_rows) + at) = omega[r];
        }
    }
}

// A running softmax over tokens of a chunk, weighted by g = grad_beta . v, in units of log 2: a lane holds
// eight columns of the sums over the tokens that its group of lanes saw.
struct ChunkSoftmax {
    float maximum = -kInfinity, sum = 0, sum_g = 0;
    Float8 sum_gk{}, sum_k{};

    // Brings the sums to a maximum that is at least the own; returns what to subtract from logits.
    __device__ float raise(float to) {
        const float shift = to == -kInfinity ? 0.0f : to;
        const float factor = exp2_approx(maximum - shift);
        maximum = to;
        sum *= factor;
        sum_g *= factor;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum_gk.x[i] *= factor, sum_k.x[i] *= factor;
        return shift;
    }
    __device__ void add(float weight, float g, const Float8& key) {
        sum += weight;
        sum_g += weight * g;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum_gk.x[i] += weight * g * key.x[i];
            sum_k.x[i] += weight * key.x[i];
        }
    }
    // A token's, where `inverse` is that of the sum.
    __device__ float weight(float logit, float inverse) const {
        return logit == -kInfinity ? 0.0f : exp2_approx(logit - maximum) * inverse;
    }
    // Adds what the groups of lanes hold that are `offset` lanes away.
    __device__ void combine(int offset) {
        const auto shuffle = [offset](float x) { return __shfl_xor_sync(0xffffffffu, x, offset); };
        raise(fmaxf(maximum, shuffle(maximum)));
        sum += shuffle(sum);
        sum_g += shuffle(sum_g);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sum_gk.x[i] += shuffle(sum_gk.x[i]);
            sum_k.x[i] += shuffle(sum_k.x[i]);
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
    static constexpr int kUnroll = 4; // tokens of a group that are taken together
    static constexpr int kCtasPerSm = 2;
    static_assert(kUnits % kUnroll == 0);

    struct Part { // what one warp saw of a chunk
        float maximum, sum, sum_g, unused;
        float sum_gk[kHeadDim], sum_k[kHeadDim];
    };
};

// token_weight, token_grad, chunk_stats, omega and grad_beta; grad_mu.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    chunk_tokens_bwd_kernel(const __grid_constant__ SummaryParams p,
                            const __grid_constant__ SummaryGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kUnits = Traits::kUnits, kUnroll = Traits::kUnroll;
    __shared__ typename Traits::Part part[Traits::kThreads / kWarpSize];
    wait_for_dependencies();

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

    const int bh = static_cast<unsigned>(index) / static_cast<unsigned>(plan.chunks);
    const int batch = static_cast<unsigned>(bh) / static_cast<unsigned>(heads), head = bh - batch * heads;
    const int within = index - bh * plan.chunks;
    const TokenBox box = plan.box(g, within);
    const bool* const mask = p.key_padding_mask ? p.key_padding_mask + int64_t{batch} * num_tokens : nullptr;
    float* const token_weight = static_cast<float*>(p.token_weight) + int64_t{bh} * num_tokens;
    float* const token_grad = static_cast<float*>(p.token_grad) + int64_t{bh} * num_tokens;
    const int64_t row = int64_t{index} * head_dim + column; // in the chunks' arrays
    const int members = active ? plan.chunk.size() : 0, first_token = box.first_token();
    const int rows_left = box.grid_height - box.y0, columns_left = box.grid_width - box.x0;
    const auto token_of = [&](int pass) { // negative: none
        const int member = (pass << plan.parts_log2) + own_part;
        const int y = divide(member, plan.chunk.width_reciprocal), x = member - y * plan.chunk.width;
        const bool exists = (member < members) & (y < rows_left) & (x < columns_left);
        return exists ? first_token + y * box.grid_width + x : -1;
    };

    const char* const keys =
        reinterpret_cast<const char*>(head_rows<S>(p.key, batch, head) + (in_row ? column : 0));
    const char* const values =
        reinterpret_cast<const char*>(head_rows<S>(p.value, batch, head) + (in_row ? column : 0));
    const int key_stride = static_cast<int>(p.key.token_stride * sizeof(S));
    const int value_stride = static_cast<int>(p.value.token_stride * sizeof(S));
    Float8 omega{}, grad_beta{};
    if (in_row) {
        omega = load8(static_cast<const float*>(p.omega_rows) + row);
        grad_beta = load_first_piece<S>(
            p, gradient_columns<S>(p, p.grad_landmark_value, landmark_row(p, plan, index), column));
    }

    // kUnits passes make a batch: each lane keeps the logit and g of one of its group's tokens; if there is
    // another batch, it leaves both where the token's results will stand.
    ChunkSoftmax softmax;
    float kept_logit = -kInfinity, kept_g = 0;
    const bool one_batch = plan.passes <= kUnits;
    for (int pass = 0; pass < plan.passes; pass += kUnroll) {
        int token[kUnroll];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) token[j] = token_of(pass + j);
        if (mask) {
#pragma unroll
            for (int j = 0; j < kUnroll; ++j)
                if (token[j] >= 0 && mask[token[j]]) token[j] = -1;
        }
        uint4 key_row[kUnroll], value_row[kUnroll];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
            const bool valid = token[j] >= 0 && in_row;
            key_row[j] = load_streaming(keys + int64_t{token[j]} * key_stride, valid);
            value_row[j] = load_streaming(values + int64_t{token[j]} * value_stride, valid);
        }
        float logit[kUnroll], token_g[kUnroll];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {
            const Float8 key = unpack8<S>(key_row[j]), value = unpack8<S>(value_row[j]);
            logit[j] = token_g[j] = 0;
#pragma unroll
            for (int d = 0; d < 8; ++d) {
                logit[j] += key.x[d] * (omega.x[d] - 0.5f * key.x[d]);
                token_g[j] += grad_beta.x[d] * value.x[d];
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
            logit[j] = token[j] >= 0 ? logit[j] * scale_log2 : -kInfinity;
            largest = fmaxf(largest, logit[j]);
            if ((pass + j) % kUnits == unit) kept_logit = logit[j], kept_g = token_g[j];
        }
        const float shift = softmax.raise(largest);
#pragma unroll
        for (int j = 0; j < kUnroll; ++j)
            softmax.add(exp2_approx(logit[j] - shift), token_g[j], unpack8<S>(key_row[j]));
        if (one_batch || ((pass + kUnroll) % kUnits != 0 && pass + kUnroll < plan.passes)) continue;
        const int own_token = token_of(pass / kUnits * kUnits + unit);
        if (own_token >= 0) token_weight[own_token] = kept_logit, token_grad[own_token] = kept_g;
    }
    for (int offset = kUnits; offset < min(kWarpSize, kUnits << plan.parts_log2); offset *= 2)
        softmax.combine(offset);
    if (kUnits << plan.parts_log2 > kWarpSize) {
        const int warp = threadIdx.x / kWarpSize, warps = (kUnits << plan.parts_log2) / kWarpSize;
        if (threadIdx.x % kWarpSize < kUnits) {
            part[warp].maximum = softmax.maximum;
            part[warp].sum = softmax.sum;
            part[warp].sum_g = softmax.sum_g;
            store8(part[warp].sum_gk + column, softmax.sum_gk);
            store8(part[warp].sum_k + column, softmax.sum_k);
        }
        __syncthreads();
        const int first = warp / warps * warps;
        float largest = -kInfinity;
        for (int i = first; i < first + warps; ++i) largest = fmaxf(largest, part[i].maximum);
        softmax = ChunkSoftmax{};
        const float shift = softmax.raise(largest);
        for (int i = first; i < first + warps; ++i) {
            const float factor = exp2_approx(part[i].maximum - shift);
            softmax.sum += factor * part[i].sum;
            softmax.sum_g += factor * part[i].sum_g;
            if (own_part != 0) continue; // which needs no more
            const Float8 gk = load8(part[i].sum_gk + column), k = load8(part[i].sum_k + column);
#pragma unroll
            for (int d = 0; d < 8; ++d)
                softmax.sum_gk.x[d] += factor * gk.x[d], softmax.sum_k.x[d] += factor * k.x[d];
        }
    }

    const float inverse = softmax.sum > 0 ? 1.0f / softmax.sum : 0.0f;
    const float mean_g = softmax.sum_g * inverse;
    for (int pass = unit; pass < plan.passes; pass += kUnits) {
        const int token = token_of(pass);
        if (token < 0) continue;
        const float logit = one_batch ? kept_logit : token_weight[token];
        const float token_g = one_batch ? kept_g : token_grad[token];
        const float weight = softmax.weight(logit, inverse);
        token_weight[token] = weight;
        token_grad[token] = scale * weight * (token_g - mean_g);
    }
    if (own_part != 0 || !in_row) return;
    const auto store_row = [row](void* to, const Float8& x) {
        *reinterpret_cast<uint4*>(static_cast<S*>(to) + row) = pack8<S>(x);
    };
    store_row(p.omega, omega);
    store_row(p.grad_beta, grad_beta);
    Float8 grad_mu;
    const float factor = has_mu ? scale * static_cast<float>(p.mu_scale) * inverse : 0.0f;
#pragma unroll
    for (int d = 0; d < 8; ++d) grad_mu.x[d] = factor * (softmax.sum_gk.x[d] - mean_g * softmax.sum_k.x[d]);
    store8(static_cast<float*>(p.grad_mu) + row, grad_mu);
    if (!has_mu) store_row(p.grad_query_mean, grad_mu);
    if (unit != 0) return;
    float* const stats = static_cast<float*>(p.chunk_stats) + 2 * int64_t{index};
    stats[0] = softmax.sum > 0 ? (softmax.maximum + log2f(softmax.sum)) * kLn2 : 0.0f;
    stats[1] = mean_g;
}

// From the gradients of landmark keys and of mu to those of the means and of one projection.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    chunk_projections_bwd_kernel(const __grid_constant__ SummaryParams p,
                                 const __grid_constant__ SummaryGradPlan plan) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kLanes = Traits::kLanes, kRowTiles = Traits::kRowTiles;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    wait_for_dependencies();
    using Rows = SplitRows<kHeadDim>;
    const Rows means{{shared.mean}}, grads{{shared.grad}};

    const int head_dim = static_cast<int>(p.shape.head_dim);
    const int branches = count_projected(p), branch = blockIdx.x % branches, piece = blockIdx.x / branches;
    const Projection& projection = branch ? p.query_projection : p.key_projection;
    const bool norm = projection.norm_weight != nullptr;
    const int warp = threadIdx.x / kWarpSize;
    const int own = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 8; // the lane's rows: own + 16 i
    const bool inside = column < head_dim;
    const int step = gridDim.x / branches * plan.group;
    const float reciprocal_dim = 1.0f / static_cast<float>(head_dim);

    const auto load = [&](int first) {
        const int count = min(plan.group, plan.total - first);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            const bool exists = own + 16 * i < count && inside;
            const int64_t at = int64_t{first + own + 16 * i} * head_dim + column;
            const auto* mean = static_cast<const float*>(branch ? p.query_mean : p.key_mean) + at;
            const auto* grad_mu = static_cast<const float*>(p.grad_mu) + at;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                copy_async(&shared.stage[i][0][half][threadIdx.x], mean + 4 * half, exists);
                copy_async(&shared.stage[i][1][half][threadIdx.x], grad_mu + 4 * half, exists);
            }
        }
        copy_commit();
    };
    const auto staged = [&](int i, int which) {
        Float8 x;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint4*>(x.x + 4 * half) = shared.stage[i][which][half][threadIdx.x];
        return x;
    };
    // What a chunk's mean was multiplied by.
    const float usual_factor = 1.0f / static_cast<float>(max(plan.divisor, 1));
    const auto factor_of = [&](int chunk) {
        if (plan.divisor != 0) return usual_factor;
        const Geometry& g = p.shape.geometry;
        const int bh = chunk / plan.chunks;
        const TokenBox box = plan.box(g, chunk - bh * plan.chunks);
        int count =
            min(plan.chunk.height, box.grid_height - box.y0) * min(plan.chunk.width, box.grid_width - box.x0);
        if (p.key_padding_mask) {
            const bool* const mask =
                p.key_padding_mask + bh / static_cast<int>(p.shape.heads) * g.num_tokens();
            int padding = 0;
            for (int i = threadIdx.x % kLanes; i < plan.chunk.size(); i += kLanes) {
                const int token = box.token(i);
                padding += token >= 0 && mask[token];
            }
            count -= static_cast<int>(lanes_sum<kLanes>(static_cast<float>(padding)));
        }
        return 1.0f / static_cast<float>(max(count, 1));
    };

    load(piece * plan.group);
    if (p.has_projection) shared.weights.template load<S, Traits::kThreads>(projection, head_dim);
    LinearGradient<kHeadDim> linear_gradient;
    NormGradient<kLanes> norm_gradient;
    for (int first = piece * plan.group; first < plan.total; first += step) {
        const int count = min(plan.group, plan.total - first);
        Float8 grad[kRowTiles] = {};
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
            if (branch == 0 && own + 16 * i < count && inside)
                grad[i] = load_first_piece<S>(
                    p, gradient_columns<S>(p, p.grad_landmark_key,
                                           landmark_row(p, plan, first + own + 16 * i), column));
        copy_wait<0>();
        if (p.has_projection) {
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) means.store(own + 16 * i, column, staged(i, 0));
        }
        if (norm) {
            __syncthreads();
            float product[kRowTiles][2][4];
            multiply_weight<true>(product, means, shared.weights.linear(), 16 * warp);
            store_product(grads, product, 16 * warp);
            __syncthreads();
        }
        auto* const out =
            static_cast<S*>(branch ? p.grad_query_mean : p.grad_key_mean) + int64_t{first} * head_dim;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            const int row = own + 16 * i;
            const bool exists = row < count && inside;
            const Float8 grad_mu = staged(i, 1);
#pragma unroll
            for (int d = 0; d < 8; ++d) grad[i].x[d] += grad_mu.x[d];
            const float factor = factor_of(min(first + row, plan.total - 1));
            if (!p.has_projection) {
#pragma unroll
                for (int d = 0; d < 8; ++d) grad[i].x[d] *= factor;
                if (exists) *reinterpret_cast<uint4*>(out + row * head_dim + column) = pack8<S>(grad[i]);
                continue;
            }
            if (column == 0) shared.factor[row] = factor;
            Float8& dy = grad[i];
            if (norm) {
                Float8 x = grads.load_floats(row, column);
                const float rstd = shared.weights.template standardise<kLanes>(
                    x, column, inside, reciprocal_dim, static_cast<float>(p.norm_eps), norm);
                norm_gradient.add(dy, x, shared.weights.load8(shared.weights.norm_weight, column), rstd,
                                  reciprocal_dim, exists);
            }
            grads.store(row, column, dy);
        }
        if (first + step < plan.total) load(first + step);
        if (!p.has_projection) continue;
        __syncthreads();

        linear_backward<S, kRowTiles>(grads, means, shared.weights.linear(), 16 * warp, count, shared.factor,
                                      out, head_dim, linear_gradient);
        __syncthreads();
    }

    if (!p.has_projection) return;
    // Of a projection: the Linear's weight [D, D], its bias, the LayerNorm's weight and bias.
    const int size = (head_dim + 3) * head_dim;
    float* const out = static_cast<float*>(p.grad_projections) + (int64_t{piece} * 2 + branch) * size;
    linear_gradient.store(out, 16 * warp, head_dim);
    norm_gradient.template store<Traits::kThreads>(out + (head_dim + 1) * head_dim,
                                                   reinterpret_cast<float*>(shared.stage), head_dim);
}

// How many blocks share the chunks in the gradients of one projection.
template <class Traits>
int count_projection_blocks(const SummaryGradPlan& plan) {
    return static_cast<int>(
        detail::max(1, detail::min(132 * Traits::kCtasPerSm / 2, detail::ceil_div(plan.total, plan.group))));
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
        .divisor = static_cast<int>(p.mean_divisor),
        .omega_blocks = 0,
    };
    if (p.mean_divisor == 0 && !p.key_padding_mask && g.grid_height % g.chunk_height == 0 &&
        g.grid_width % g.chunk_width == 0)
        plan.divisor = plan.chunk.size();
    // As many groups of chunks as fill the GPUs of the day evenly, by the shape alone.
    const int64_t blocks = 132 * Projections::kCtasPerSm / 2;
    const int64_t rounds = detail::max(1, detail::ceil_div(plan.total, blocks * Projections::kMaxChunks));
    plan.group = static_cast<int>(detail::max(16, detail::ceil_div(plan.total, blocks * rounds)));
    while (Tokens::kUnits << plan.parts_log2 < plan.chunk.size() && 2 << plan.parts_log2 <= Tokens::kGroups)
        ++plan.parts_log2;
    plan.passes = static_cast<int>(detail::ceil_div(plan.chunk.size(), int64_t{1} << plan.parts_log2));
    return plan;
}

template <class S, int kHeadDim>
int64_t count_projection_pieces(const SummaryParams& p) {
    return count_projection_blocks<ProjectionTraits<S, kHeadDim>>(plan_chunk_summary_bwd<S, kHeadDim>(p));
}

// For kernels of which a block takes tiles of kRows chunks in turn.
template <class Traits>
int64_t count_tiles(const SummaryParams& p) {
    return detail::ceil_div(p.shape.batch * p.shape.heads * p.shape.geometry.num_chunks(), Traits::kRows);
}
// How many blocks: the fewest that end as soon as what fills the GPUs of the day, by the shape alone.
template <class Traits>
int64_t count_blocks_in_turn(const SummaryParams& p) {
    const int64_t tiles = detail::max(1, count_tiles<Traits>(p));
    return detail::ceil_div(tiles, detail::ceil_div(tiles, 132 * Traits::kCtasPerSm));
}

template <class S, int kHeadDim>
void launch_chunk_summary_bwd(const SummaryParams& p, cudaStream_t stream) {
    using Projections = ProjectionTraits<S, kHeadDim>;
    using Tokens = ChunkTokensTraits<S, kHeadDim>;
    const SummaryGradPlan plan = plan_chunk_summary_bwd<S, kHeadDim>(p);
    if (plan.total > 0) {
        constexpr int kBytes = sizeof(typename Projections::Shared),
                      kOmegaBytes = sizeof(typename Projections::OmegaShared);
        constexpr int kMost = 99 << 10; // what every GPU from sm_80 on lets a block have
        static_assert(kBytes <= kMost && kOmegaBytes <= kMost);
        const int projection_blocks = count_projection_blocks<Projections>(plan);
        const int chunks_per_block = Tokens::kGroups >> plan.parts_log2;
        const int64_t sums = 2 * plan.total * p.shape.head_dim / 4;
        const int64_t sum_blocks =
            p.pieces == 1 ? 0 : detail::min(264, detail::ceil_div(sums, Projections::kOmegaThreads));
        static LimitsOf omega_limits, projection_limits;
        omega_limits(chunk_omega_kernel<Projections>);
        projection_limits(chunk_projections_bwd_kernel<Projections>);
        if (sum_blocks > 0)
            launch_dependent(chunk_omega_kernel<Projections>, sum_blocks, Projections::kOmegaThreads,
                             kOmegaBytes, stream, p, plan);
        launch_dependent(chunk_tokens_bwd_kernel<Tokens>, detail::ceil_div(plan.total, chunks_per_block),
                         Tokens::kThreads, 0, stream, p, plan);
        launch_dependent(chunk_projections_bwd_kernel<Projections>, projection_blocks * count_projected(p),
                         Projections::kThreads, kBytes, stream, p, plan);
    }
}

} // namespace eva_attn::cuda::mma
