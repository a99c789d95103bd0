// Backward of the summaries of chunks of any number of members, in one kernel: two groups of lanes take a
// chunk, each a projection and every other member, whose rows are under way while the projections are
// computed.
#pragma once

#include "kernels/cuda/mma/chunk_summary_bwd.cuh"

namespace eva_attn::cuda::mma {

struct FusedGradTraits {
    static constexpr int kHeadDim = 64, kLanes = kHeadDim / 8;
    static constexpr int kMaxMembers = 64; // where there are few chunks
    static constexpr int kThreads = 256, kRows = kThreads / (2 * kLanes), kCtasPerSm = 2;
    static constexpr int kParts = kHeadDim / 16;  // of a product, each a warp's
    static constexpr int kUnroll = 2, kSlots = 3; // members of a group that are taken together
    static_assert(kThreads / kWarpSize == 2 * kParts && kRows == 16);

    struct Shared { // of the key's projection, of the query's
        ProjectionWeights<kHeadDim> weights[2];
        alignas(4 * kHeadDim) __nv_bfloat16 mean[2][kRows * 2 * kHeadDim];
        __nv_bfloat16 grad[2][kRows * 2 * kHeadDim]; // of the Linear's output, which it held before
        uint4 key[kSlots][kUnroll][kThreads], value[kSlots][kUnroll][kThreads]; // the next members'
        float factor[kRows];
    };
    static_assert(sizeof(Shared) <= 99 << 10); // what every GPU from sm_80 on lets a block have
};

template <class S>
__global__ void __launch_bounds__(FusedGradTraits::kThreads, FusedGradTraits::kCtasPerSm)
    chunk_summary_bwd_fused_kernel(const __grid_constant__ SummaryParams p,
                                   const __grid_constant__ SummaryGradPlan plan) {
    using Traits = FusedGradTraits;
    constexpr int kHeadDim = Traits::kHeadDim, kLanes = Traits::kLanes, kRows = Traits::kRows,
                  kUnroll = Traits::kUnroll, kSlots = Traits::kSlots;
    using Rows = SplitRows<kHeadDim>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<Traits::Shared*>(memory);
    wait_for_dependencies();

    const Geometry& g = p.shape.geometry;
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const int num_tokens = static_cast<int>(g.num_tokens()), grid_width = static_cast<int>(g.grid_width);
    const bool has_mu = !p.has_projection || p.has_query_projection;
    const int projected = !p.has_projection ? 0 : p.has_query_projection ? 2 : 1;
    const bool norm = p.key_projection.norm_weight != nullptr; // of both projections
    const int warp = threadIdx.x / kWarpSize, row = threadIdx.x / (2 * kLanes);
    const int branch = threadIdx.x / kLanes % 2; // 0 takes the key's projection, 1 the query's
    const int unit = threadIdx.x % kLanes, column = unit * 8;
    const bool inside = column < head_dim;
    // A product's: of which projection, from which column on.
    const int warp_branch = warp / Traits::kParts, warp_column = warp % Traits::kParts * 16;
    const float reciprocal_dim = 1.0f / static_cast<float>(head_dim);
    const float mu_scale = has_mu ? static_cast<float>(p.mu_scale) : 0.0f;
    const float scale = static_cast<float>(p.scale);
    const int step = kRows * gridDim.x;
    const Rows means{{shared.mean[branch]}}, grads{{shared.grad[branch]}};
    const auto& weights = shared.weights[branch];

    struct Chunk {
        int bh, first_token, height, width; // as far as it lies in the grid
    };
    const auto chunk_of = [&](int index) {
        const int bh = static_cast<unsigned>(index) / static_cast<unsigned>(plan.chunks);
        const TokenBox box = plan.box(g, index - bh * plan.chunks);
        return Chunk{
            .bh = bh,
            .first_token = box.first_token(),
            .height = index < plan.total ? min(plan.chunk.height, box.grid_height - box.y0) : 0,
            .width = grid_width - box.x0,
        };
    };
    // In each pass a group takes one member; negative: none.
    const int passes = (plan.chunk.size() + 1) / 2;
    const auto token_of = [&](const Chunk& chunk, int pass) {
        const int member = 2 * pass + branch;
        const int y = divide(member, plan.chunk.width_reciprocal), x = member - y * plan.chunk.width;
        return (y < chunk.height) & (x < chunk.width) ? chunk.first_token + y * grid_width + x : -1;
    };

    // Begins to copy the next members' keys and values.
    struct {
        int index, pass, batch;
        const char *keys, *values;
        Chunk chunk;
        int token;      // of pass `unit` of eight; negative: none, or padding
        uint32_t valid; // a bit for each of the last members
    } ahead{.index = kRows * static_cast<int>(blockIdx.x) + row};
    const int key_stride = static_cast<int>(p.key.token_stride * sizeof(S));
    const int value_stride = static_cast<int>(p.value.token_stride * sizeof(S));
    const auto load = [&](int slot) {
        if (ahead.pass % kLanes == 0) {
            if (ahead.pass == 0) {
                ahead.chunk = chunk_of(ahead.index);
                const int bh = ahead.chunk.bh;
                const int batch = static_cast<unsigned>(bh) / static_cast<unsigned>(heads);
                const int head = bh - batch * heads;
                ahead.keys = reinterpret_cast<const char*>(head_rows<S>(p.key, batch, head) + column);
                ahead.values = reinterpret_cast<const char*>(head_rows<S>(p.value, batch, head) + column);
                ahead.batch = batch;
            }
            ahead.token = token_of(ahead.chunk, ahead.pass + unit);
            if (p.key_padding_mask && ahead.token >= 0 &&
                p.key_padding_mask[int64_t{ahead.batch} * num_tokens + ahead.token])
                ahead.token = -1;
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int token = __shfl_sync(0xffffffffu, ahead.token, ahead.pass + u, kLanes);
            ahead.valid = ahead.valid << 1 | (token >= 0);
            const int copied = inside ? token : -1;
            copy_async_at(copied, &shared.key[slot][u][threadIdx.x],
                          ahead.keys + int64_t{token} * key_stride);
            copy_async_at(copied, &shared.value[slot][u][threadIdx.x],
                          ahead.values + int64_t{token} * value_stride);
        }
        copy_commit();
        ahead.pass += kUnroll;
        if (ahead.pass >= passes) ahead.pass = 0, ahead.index += step;
    };
    // The next tile's, which the copies have reached and not yet passed where a tile takes all slots.
    const auto next_chunk = [&](int index) {
        return passes > kUnroll * (kSlots - 1) ? ahead.chunk : chunk_of(index);
    };
    const auto load_gradient = [&](const void* pieces, int index, int bh) {
        return load_pieces<S>(p, gradient_columns<S>(p, pieces, landmark_row(p, plan, index, bh), column));
    };
    const auto* const saved_mean = static_cast<const float*>(branch ? p.query_mean : p.key_mean);
    const bool has_mean = branch == 0 || has_mu;

    for (int slot = 0; slot < kSlots; ++slot) load(slot);
    for (int b = 0; b < projected; ++b)
        shared.weights[b].template load<S, Traits::kThreads>(b ? p.query_projection : p.key_projection,
                                                             head_dim);
    LinearGradient<kHeadDim> linear_gradient; // the warp's
    NormGradient<kLanes> norm_gradient;       // the group's
    int slot = 0;
    Chunk next = next_chunk(kRows * blockIdx.x + row);
    for (int first = kRows * blockIdx.x; first < plan.total; first += step) {
        const Chunk chunk = next;
        const int index = first + row;
        const bool exists = index < plan.total && inside;
        const int64_t at = int64_t{first} * head_dim + (row * head_dim + column);
        const auto store_row = [&](void* to, const Float8& x) {
            if (exists) *reinterpret_cast<uint4*>(static_cast<S*>(to) + at) = pack8<S>(x);
        };

        Float8 grad_beta{}, mu{}; // of scale 1, the projection's term
        if (exists && has_mean) mu = load8(saved_mean + at);
        if (exists) grad_beta = load_gradient(p.grad_landmark_value, index, chunk.bh);
        float rstd = 1;
        if (projected > 0) {
            means.store(row, column, mu);
            __syncthreads();
            if (warp_branch < projected) {
                float product[1][2][4];
                multiply_weight<true>(product, Rows{{shared.mean[warp_branch]}},
                                      shared.weights[warp_branch].linear(), warp_column);
                store_product(Rows{{shared.grad[warp_branch]}}, product, warp_column);
            }
            __syncthreads();
            mu = grads.load_floats(row, column);
            rstd = weights.template standardise<kLanes>(mu, column, inside, reciprocal_dim,
                                                        static_cast<float>(p.norm_eps), norm);
            grads.store_floats(row, column, mu);
            weights.scale(mu, column);
        }
        Float8 omega{};
        if (p.noise && exists) omega = load8(static_cast<const float*>(p.noise) + at);
        if (has_mu) {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                omega.x[i] += mu_scale * (mu.x[i] + __shfl_xor_sync(0xffffffffu, mu.x[i], kLanes));
        }
        branch == 0 ? store_row(p.omega, omega) : store_row(p.grad_beta, grad_beta);

        // kLanes passes make a batch: each lane keeps the logit and g of one of its group's tokens; if there
        // is another batch, it leaves both where the token's results will stand.
        float* const token_weight = static_cast<float*>(p.token_weight) + int64_t{chunk.bh} * num_tokens;
        float* const token_grad = static_cast<float*>(p.token_grad) + int64_t{chunk.bh} * num_tokens;
        const bool one_batch = passes <= kLanes;
        ChunkSoftmax softmax;
        float kept_logit = -kInfinity, kept_g = 0;
        int count = 0;
#pragma unroll 1
        for (int pass = 0; pass < passes; pass += kUnroll) {
            copy_wait<kSlots - 1>();
            uint4 key_row[kUnroll];
            float sums[2 * kUnroll] = {}; // logits, grad_beta . v
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                key_row[u] = shared.key[slot][u][threadIdx.x];
                const Float8 k = unpack8<S>(key_row[u]), v = unpack8<S>(shared.value[slot][u][threadIdx.x]);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    sums[u] += k.x[i] * (omega.x[i] - 0.5f * k.x[i]);
                    sums[kUnroll + u] += grad_beta.x[i] * v.x[i];
                }
            }
            const float sum = lanes_sum<kLanes>(sums);
            float logit[kUnroll], token_g[kUnroll], largest = softmax.maximum;
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const bool valid = ahead.valid >> (kUnroll * kSlots - 1 - u) & 1;
                count += valid;
                logit[u] = __shfl_sync(0xffffffffu, sum, u, kLanes) * (scale * kLog2e);
                token_g[u] = __shfl_sync(0xffffffffu, sum, kUnroll + u, kLanes);
                if (!valid) logit[u] = -kInfinity;
                largest = fmaxf(largest, logit[u]);
                if ((pass + u) % kLanes == unit) kept_logit = logit[u], kept_g = token_g[u];
            }
            load(slot);
            slot = slot + 1 == kSlots ? 0 : slot + 1;
            const float shift = softmax.raise(largest);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
                softmax.add(exp2_approx(logit[u] - shift), token_g[u], unpack8<S>(key_row[u]));
            if (one_batch || ((pass + kUnroll) % kLanes != 0 && pass + kUnroll < passes)) continue;
            const int token = token_of(chunk, pass / kLanes * kLanes + unit);
            if (token >= 0) token_weight[token] = kept_logit, token_grad[token] = kept_g;
        }
        Float8 grad{};
        if (branch == 0 && exists) grad = load_gradient(p.grad_landmark_key, index, chunk.bh);
        softmax.combine(kLanes);
        count += __shfl_xor_sync(0xffffffffu, count, kLanes);
        const float inverse = softmax.sum > 0 ? reciprocal_approx(softmax.sum) : 0.0f,
                    mean_g = softmax.sum_g * inverse;
#pragma unroll 1
        for (int pass = unit; pass < passes; pass += kLanes) {
            const int token = token_of(chunk, pass);
            if (token < 0) continue;
            const float logit = one_batch ? kept_logit : token_weight[token];
            const float token_g = one_batch ? kept_g : token_grad[token];
            const float weight = softmax.weight(logit, inverse);
            token_weight[token] = weight;
            token_grad[token] = scale * weight * (token_g - mean_g);
        }
        if (threadIdx.x % (2 * kLanes) == 0 && index < plan.total)
            static_cast<float2*>(p.chunk_stats)[index] = make_float2(
                softmax.sum > 0 ? (softmax.maximum + log2_approx(softmax.sum)) * kLn2 : 0.0f, mean_g);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            grad.x[i] += scale * mu_scale * inverse * (softmax.sum_gk.x[i] - mean_g * softmax.sum_k.x[i]);
        const float factor =
            reciprocal_approx(static_cast<float>(plan.divisor ? plan.divisor : max(count, 1)));
        if (branch >= projected) {
            Float8 scaled;
#pragma unroll
            for (int i = 0; i < 8; ++i) scaled.x[i] = factor * grad.x[i];
            store_row(branch ? p.grad_query_mean : p.grad_key_mean, scaled);
        }
        next = next_chunk(index + step);
        if (projected == 0) continue;
        if (norm)
            norm_gradient.add(grad, grads.load_floats(row, column),
                              weights.load8(weights.norm_weight, column), rstd, reciprocal_dim, exists);
        grads.store(row, column, grad);
        if (unit == 0) shared.factor[row] = factor;
        __syncthreads();
        if (warp_branch < projected) {
            S* const out = static_cast<S*>(warp_branch ? p.grad_query_mean : p.grad_key_mean);
            linear_backward<S, 1>(Rows{{shared.grad[warp_branch]}}, Rows{{shared.mean[warp_branch]}},
                                  shared.weights[warp_branch].linear(), warp_column,
                                  min(kRows, plan.total - first), shared.factor,
                                  out + int64_t{first} * head_dim, head_dim, linear_gradient);
        }
        __syncthreads();
    }
    if (projected == 0) return;

    // Of a projection: the Linear's weight [D, D], its bias, the LayerNorm's weight and bias.
    const int size = (head_dim + 3) * head_dim;
    float* const out = static_cast<float*>(p.grad_projections) + int64_t{blockIdx.x} * 2 * size;
    if (warp_branch < projected) linear_gradient.store(out + warp_branch * size, warp_column, head_dim);
    norm_gradient.template store<Traits::kThreads, 2>(
        out + (head_dim + 1) * head_dim, reinterpret_cast<float*>(shared.mean), head_dim, projected, size);
}

// Few chunks of many members are better shared out by members.
inline bool has_fused_gradient(const SummaryParams& p) {
    const Geometry& g = p.shape.geometry;
    return p.shape.head_dim <= FusedGradTraits::kHeadDim &&
           (g.chunk_height * g.chunk_width <= FusedGradTraits::kMaxMembers ||
            count_tiles<FusedGradTraits>(p) >= 132) &&
           (!p.has_query_projection || !p.key_projection.norm_weight == !p.query_projection.norm_weight);
}

template <class S>
bool launch_chunk_summary_bwd_fused(const SummaryParams& p, cudaStream_t stream) {
    using Traits = FusedGradTraits;
    if (!has_fused_gradient(p)) return false;
    const SummaryGradPlan plan = plan_chunk_summary_bwd<S, Traits::kHeadDim>(p);
    if (plan.total == 0) return true;
    const auto kernel = chunk_summary_bwd_fused_kernel<S>;
    static LimitsOf limits;
    limits(kernel);
    launch_dependent(kernel, count_blocks_in_turn<Traits>(p), Traits::kThreads, sizeof(Traits::Shared),
                     stream, p, plan);
    return true;
}

} // namespace eva_attn::cuda::mma
