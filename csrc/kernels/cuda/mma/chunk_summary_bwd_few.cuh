// Backward of the summaries of chunks of a few members, in one kernel: all rows of a chunk are read at once
// by the lanes of a group, and only the products are shared between warps.
#pragma once

#include "kernels/cuda/mma/chunk_summary_bwd.cuh"

namespace eva_attn::cuda::mma {

struct FewMembersGradTraits {
    static constexpr int kHeadDim = kFewMembersHeadDim, kLanes = kHeadDim / 8;
    static constexpr int kMembers = kFewMembers;
    static constexpr int kThreads = 256, kRows = kThreads / kLanes, kCtasPerSm = 2;
    static constexpr int kParts = kHeadDim / 16; // of a product, each a warp's
    static_assert(kThreads / kWarpSize == 2 * kParts && kMembers == 4);

    struct Shared { // of the key's projection, of the query's
        ProjectionWeights<kHeadDim> weights[2];
        alignas(4 * kHeadDim) __nv_bfloat16 mean[2][kRows * 2 * kHeadDim];
        __nv_bfloat16 grad[2][kRows * 2 * kHeadDim]; // of the Linear's output, which it held before
        uint4 key[kMembers][kThreads], value[kMembers][kThreads]; // the next chunk's
        float factor[kRows];
    };
    static_assert(sizeof(Shared) <= 99 << 10); // what every GPU from sm_80 on lets a block have
};

// kHasBoth: both the key's and the query's projection.
template <class S, bool kHasBoth>
__global__ void __launch_bounds__(FewMembersGradTraits::kThreads, FewMembersGradTraits::kCtasPerSm)
    chunk_summary_bwd_few_kernel(const __grid_constant__ SummaryParams p,
                                 const __grid_constant__ SummaryGradPlan plan) {
    using Traits = FewMembersGradTraits;
    constexpr int kHeadDim = Traits::kHeadDim, kLanes = Traits::kLanes, kMembers = Traits::kMembers,
                  kRows = Traits::kRows, kRowTiles = kRows / 16;
    using Rows = SplitRows<kHeadDim>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<Traits::Shared*>(memory);
    wait_for_dependencies();

    const Geometry& g = p.shape.geometry;
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const int num_tokens = static_cast<int>(g.num_tokens()), grid_width = static_cast<int>(g.grid_width);
    const bool has_mu = kHasBoth || !p.has_projection || p.has_query_projection;
    const int projected = kHasBoth ? 2 : p.has_projection ? 1 : 0;
    const int warp = threadIdx.x / kWarpSize;
    const int row = threadIdx.x / kLanes, unit = threadIdx.x % kLanes, column = unit * 8;
    const bool inside = column < head_dim;
    // A product's: of which projection, from which column on.
    const int warp_branch = warp / Traits::kParts, warp_column = warp % Traits::kParts * 16;
    const float reciprocal_dim = 1.0f / static_cast<float>(head_dim);
    const float mu_scale = has_mu ? static_cast<float>(p.mu_scale) : 0.0f;
    const float scale = static_cast<float>(p.scale);
    const auto has_norm = [&](int branch) {
        return (branch ? p.query_projection : p.key_projection).norm_weight != nullptr;
    };

    // The member of its chunk whose sums the lane gets.
    const int own = unit % kMembers, own_y = divide(own, plan.chunk.width_reciprocal),
              own_x = own - own_y * plan.chunk.width;
    struct Chunk {
        int bh, first_token;
        uint32_t members, valid; // a bit each: in the grid, not padding
    };
    // Begins to copy a chunk's keys and values.
    const auto load = [&](int index) {
        const int bh = static_cast<unsigned>(index) / static_cast<unsigned>(plan.chunks);
        const int batch = static_cast<unsigned>(bh) / static_cast<unsigned>(heads), head = bh - batch * heads;
        const TokenBox box = plan.box(g, index - bh * plan.chunks);
        const int first_token = box.first_token(), token = first_token + own_y * grid_width + own_x;
        const bool member = (index < plan.total) & (own < plan.chunk.size()) &
                            (own_y < box.grid_height - box.y0) & (own_x < grid_width - box.x0);
        bool valid = member;
        if (p.key_padding_mask && member) valid = !p.key_padding_mask[int64_t{batch} * num_tokens + token];
        const int group = threadIdx.x % kWarpSize / kLanes * kLanes;
        const Chunk chunk{
            .bh = bh,
            .first_token = first_token,
            .members = __ballot_sync(0xffffffffu, member) >> group,
            .valid = __ballot_sync(0xffffffffu, valid) >> group,
        };
        const auto* const keys = reinterpret_cast<const char*>(head_rows<S>(p.key, batch, head) + column);
        const auto* const values = reinterpret_cast<const char*>(head_rows<S>(p.value, batch, head) + column);
        const int key_stride = static_cast<int>(p.key.token_stride * sizeof(S));
        const int value_stride = static_cast<int>(p.value.token_stride * sizeof(S));
#pragma unroll
        for (int u = 0; u < kMembers; ++u) {
            const int y = divide(u, plan.chunk.width_reciprocal), x = u - y * plan.chunk.width;
            const int token = chunk.valid >> u & inside ? first_token + y * grid_width + x : -1;
            copy_async_at(token, &shared.key[u][threadIdx.x], keys + int64_t{token} * key_stride);
            copy_async_at(token, &shared.value[u][threadIdx.x], values + int64_t{token} * value_stride);
        }
        copy_commit();
        return chunk;
    };
    const auto gradient_row = [&](const void* pieces, int index, int bh) {
        return gradient_columns<S>(p, pieces, landmark_row(p, plan.chunks, index, bh), column);
    };

    const auto* const query_mean = static_cast<const char*>(p.query_mean);
    const int mean_size = p.rounded_mean ? sizeof(S) : sizeof(float);

    Chunk next = load(kRows * blockIdx.x + row);
    for (int branch = 0; branch < projected; ++branch)
        shared.weights[branch].template load<S, Traits::kThreads>(
            branch ? p.query_projection : p.key_projection, head_dim);
    LinearGradient<kHeadDim> linear_gradient; // the warp's
    NormGradient<kLanes> norm_gradient[2];
    const int step = kRows * gridDim.x;
    for (int first = kRows * blockIdx.x; first < plan.total; first += step) {
        const Chunk chunk = next;
        const int index = first + row;
        const bool exists = index < plan.total && inside;
        const int64_t at = int64_t{first} * head_dim + (row * head_dim + column);
        const auto store_row = [&](void* to, const Float8& x) {
            if (exists) *reinterpret_cast<uint4*>(static_cast<S*>(to) + at) = pack8<S>(x);
        };

        Float8 grad_beta{}, mean[2] = {};
        if (exists) grad_beta = load_pieces<S>(p, gradient_row(p.grad_landmark_value, index, chunk.bh));
        if (exists && has_mu)
            mean[1] = p.rounded_mean
                          ? unpack8<S>(*reinterpret_cast<const uint4*>(query_mean + at * mean_size))
                          : load8(reinterpret_cast<const float*>(query_mean + at * mean_size));
        copy_wait<0>();
        if (!p.rounded_gradients) store_row(p.grad_beta, grad_beta);
        float products[kMembers];
#pragma unroll
        for (int u = 0; u < kMembers; ++u) {
            const Float8 k = unpack8<S>(shared.key[u][threadIdx.x]),
                         v = unpack8<S>(shared.value[u][threadIdx.x]);
            products[u] = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                mean[0].x[i] += k.x[i];
                products[u] += grad_beta.x[i] * v.x[i];
            }
        }
        const float token_g = lanes_sum<kLanes>(products); // of member `own`: grad_beta . v
        const int divisor = plan.divisor ? plan.divisor : max(__popc(chunk.valid & 15), 1);
        const float factor = reciprocal_approx(static_cast<float>(divisor));
#pragma unroll
        for (int i = 0; i < 8; ++i) mean[0].x[i] *= factor;

        Float8 mu; // of scale 1
        float rstd[2];
        if (projected > 0) {
            if (unit == 0) shared.factor[row] = factor;
#pragma unroll
            for (int branch = 0; branch < 2; ++branch)
                if (branch < projected) Rows{{shared.mean[branch]}}.store(row, column, mean[branch]);
            __syncthreads();
            if (warp_branch < projected) {
                float product[kRowTiles][2][4];
                multiply_weight<true>(product, Rows{{shared.mean[warp_branch]}},
                                      shared.weights[warp_branch].linear(), warp_column);
                store_product(Rows{{shared.grad[warp_branch]}}, product, warp_column);
            }
            __syncthreads();
#pragma unroll
            for (int branch = 0; branch < 2; ++branch) {
                if (branch == projected) break;
                const auto& weights = shared.weights[branch];
                const Rows rows{{shared.grad[branch]}};
                Float8 x = rows.load_floats(row, column);
                rstd[branch] = weights.template standardise<kLanes>(
                    x, column, inside, reciprocal_dim, static_cast<float>(p.norm_eps), has_norm(branch));
                rows.store_floats(row, column, x);
                weights.scale(x, column);
#pragma unroll
                for (int i = 0; i < 8; ++i) mu.x[i] = branch ? mu.x[i] + x.x[i] : x.x[i];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) mu.x[i] = mean[0].x[i] + mean[1].x[i];
        }
        Float8 omega{};
        if (p.noise && exists) omega = load8(static_cast<const float*>(p.noise) + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) omega.x[i] += mu_scale * mu.x[i];
        store_row(p.omega, omega);

        // The chunk's softmax, in units of log 2.
#pragma unroll
        for (int u = 0; u < kMembers; ++u) {
            const Float8 k = unpack8<S>(shared.key[u][threadIdx.x]);
            products[u] = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) products[u] += k.x[i] * (omega.x[i] - 0.5f * k.x[i]);
        }
        float logit = lanes_sum<kLanes>(products) * (scale * kLog2e);
        if (!(chunk.valid >> own & 1)) logit = -kInfinity;
        const float maximum = quad_max(logit), largest = maximum == -kInfinity ? 0.0f : maximum;
        float weight = exp2_approx(logit - largest);
        const float total = quad_sum(weight), reciprocal = total > 0 ? reciprocal_approx(total) : 0.0f;
        weight *= reciprocal;
        const float mean_g = quad_sum(weight * token_g);
        const float token_grad = scale * weight * (token_g - mean_g);
        if (unit == own && chunk.members >> own & 1) {
            const int64_t token =
                int64_t{chunk.bh} * num_tokens + (chunk.first_token + own_y * grid_width + own_x);
            static_cast<float*>(p.token_weight)[token] = weight;
            static_cast<float*>(p.token_grad)[token] = token_grad;
        }
        Float8 grad_mu{}; // of mu's terms
#pragma unroll
        for (int u = 0; u < kMembers; ++u) {
            const Float8 k = unpack8<S>(shared.key[u][threadIdx.x]);
            const float factor = mu_scale * __shfl_sync(0xffffffffu, token_grad, u, kLanes);
#pragma unroll
            for (int i = 0; i < 8; ++i) grad_mu.x[i] += factor * k.x[i];
        }
        if (unit == 0 && index < plan.total)
            static_cast<float2*>(p.chunk_stats)[index] =
                make_float2(total > 0 ? (largest + log2_approx(total)) * kLn2 : 0.0f, mean_g);
        Float8 grad[2] = {grad_mu, grad_mu};
        if (exists) {
            const Float8 grad_key = load_pieces<S>(p, gradient_row(p.grad_landmark_key, index, chunk.bh));
#pragma unroll
            for (int i = 0; i < 8; ++i) grad[0].x[i] += grad_key.x[i];
        }
        void* const outputs[2] = {p.grad_key_mean, p.grad_query_mean};
#pragma unroll
        for (int branch = 0; branch < 2; ++branch) {
            if (branch < projected) {
                const auto& weights = shared.weights[branch];
                const Rows rows{{shared.grad[branch]}};
                if (has_norm(branch))
                    norm_gradient[branch].add(grad[branch], rows.load_floats(row, column),
                                              weights.load8(weights.norm_weight, column), rstd[branch],
                                              reciprocal_dim, exists);
                rows.store(row, column, grad[branch]);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) grad[branch].x[i] *= factor;
                store_row(outputs[branch], grad[branch]);
            }
        }
        next = load(index + step); // keys and values are used up
        if (index + step < plan.total && inside) {
            prefetch(gradient_row(p.grad_landmark_value, index + step, next.bh));
            prefetch(gradient_row(p.grad_landmark_key, index + step, next.bh));
            const int64_t next_at = at + int64_t{step} * head_dim;
            if (has_mu) prefetch(query_mean + next_at * mean_size);
            if (p.noise) prefetch(static_cast<const float*>(p.noise) + next_at);
        }
        if (projected == 0) continue;
        __syncthreads();
        if (warp_branch < projected) {
            S* const out = static_cast<S*>(warp_branch ? p.grad_query_mean : p.grad_key_mean);
            linear_backward<S, kRowTiles>(Rows{{shared.grad[warp_branch]}}, Rows{{shared.mean[warp_branch]}},
                                          shared.weights[warp_branch].linear(), warp_column,
                                          min(kRows, plan.total - first), shared.factor,
                                          out + int64_t{first} * head_dim, head_dim, linear_gradient);
        }
        __syncthreads();
    }

    // Of a projection: the Linear's weight [D, D], its bias, the LayerNorm's weight and bias.
    const int size = (head_dim + 3) * head_dim;
    const auto out = [&](int branch) {
        return static_cast<float*>(p.grad_projections) + (int64_t{blockIdx.x} * 2 + branch) * size;
    };
    if (warp_branch < projected) linear_gradient.store(out(warp_branch), warp_column, head_dim);
#pragma unroll
    for (int branch = 0; branch < 2; ++branch)
        if (branch < projected)
            norm_gradient[branch].template store<Traits::kThreads>(
                out(branch) + (head_dim + 1) * head_dim, reinterpret_cast<float*>(shared.mean), head_dim);
}

// The fewest that end as soon as what fills the GPUs of the day, by the shape alone.
inline int64_t count_few_members_blocks(const SummaryParams& p) {
    using Traits = FewMembersGradTraits;
    const int64_t chunks = p.shape.batch * p.shape.heads * p.shape.geometry.num_chunks(),
                  tiles = detail::max(1, detail::ceil_div(chunks, Traits::kRows));
    return detail::ceil_div(tiles, detail::ceil_div(tiles, 132 * Traits::kCtasPerSm));
}

template <class S>
bool launch_chunk_summary_bwd_few(const SummaryParams& p, cudaStream_t stream) {
    using Traits = FewMembersGradTraits;
    if (!has_few_members(p.shape)) return false;
    const SummaryGradPlan plan = plan_chunk_summary_bwd<S, Traits::kHeadDim>(p);
    if (plan.total == 0) return true;
    const auto kernel = p.has_query_projection ? chunk_summary_bwd_few_kernel<S, true>
                                               : chunk_summary_bwd_few_kernel<S, false>;
    static LimitsOf limits_of[2];
    limits_of[p.has_query_projection](kernel);
    launch_dependent(kernel, count_few_members_blocks(p), Traits::kThreads, sizeof(Traits::Shared), stream, p,
                     plan);
    return true;
}

} // namespace eva_attn::cuda::mma
