// Backward of the summaries' softmax: from the gradients of landmark values to what each token needs of its
// chunk and to the gradient of omega. A stream over keys and values: kHeadDim / 8 lanes take a token, and one
// such group of lanes, or several of a block, take one chunk after the other. The rows of the next tokens,
// also those of the next chunks, are under way meanwhile; a lane reads from shared memory what it copied
// itself.
#pragma once

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/mma/bwd_utils.cuh"

namespace eva_attn::cuda::mma {

template <class S_, int kHeadDim_>
struct ChunkTokensTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize, kCtasPerSm = 2;
    static constexpr int kLanes = kHeadDim / 8; // that share a token
    static constexpr int kGroupsPerWarpLog2 = kHeadDim == 64 ? 2 : 1,
                         kGroupsPerWarp = 1 << kGroupsPerWarpLog2;
    static constexpr int kGroups = kWarps * kGroupsPerWarp;
    static_assert(kGroupsPerWarp * kLanes == kWarpSize);
    static constexpr int kUnroll = 4; // passes of one token a group that are taken together
    static constexpr int kSlots = 2;  // such ones that lie in shared memory
    static constexpr int kKept = 8;
    static_assert(kLanes % kUnroll == 0);

    struct Shared {
        uint4 rows[kSlots][kUnroll][2][kThreads]; // keys, values
        float2 kept[kKept][kThreads]; // logit, grad_beta . v of every kLanes-th of a group's tokens
        // Of what one warp saw of a chunk:
        float4 softmax[2][kWarps]; // maximum, sum, sum of grad_beta . v
        float grad_mu[kWarps][kHeadDim];
    };
    static_assert(sizeof(Shared) <= 99 << 10); // what every GPU from sm_80 on lets a block have
};

// A chunk of all, of which those of all heads come one after the other, as they lie side by side in memory.
struct ChunkCursor {
    int head, x, y, batch;
};

struct ChunkTokensPlan {
    BoxShape chunk;
    int heads, columns, rows, batches; // of chunks
    int total;
    int parts_log2 = 0; // groups of lanes that share a chunk
    int passes = 0;     // tokens that each of them takes
    ChunkCursor step{};

    __host__ __device__ ChunkCursor cursor(int index) const {
        const unsigned i = index, x = i / heads, y = x / columns, batch = y / rows;
        return ChunkCursor{
            .head = static_cast<int>(i - x * heads),
            .x = static_cast<int>(x - y * columns),
            .y = static_cast<int>(y - batch * rows),
            .batch = static_cast<int>(batch),
        };
    }
    // In the chunks' arrays.
    __device__ int row(const ChunkCursor& at) const {
        return ((at.batch * heads + at.head) * rows + at.y) * columns + at.x;
    }
    __device__ void advance(ChunkCursor& at) const {
        at.head += step.head;
        at.x += step.x;
        at.y += step.y;
        at.batch += step.batch;
        if (at.head >= heads) at.head -= heads, ++at.x;
        if (at.x >= columns) at.x -= columns, ++at.y;
        if (at.y >= rows) at.y -= rows, ++at.batch;
    }
};

// token_weight, token_grad, chunk_stats, omega, grad_beta and grad_mu.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    chunk_tokens_bwd_kernel(const __grid_constant__ SummaryParams p,
                            const __grid_constant__ ChunkTokensPlan plan) {
    using S = typename Traits::S;
    constexpr int kLanes = Traits::kLanes, kUnroll = Traits::kUnroll, kSlots = Traits::kSlots,
                  kKept = Traits::kKept;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    wait_for_dependencies();

    const Geometry& g = p.shape.geometry;
    const int head_dim = static_cast<int>(p.shape.head_dim), grid_width = static_cast<int>(g.grid_width);
    const int num_tokens = static_cast<int>(g.num_tokens());
    const bool has_mu = !p.has_projection || p.has_query_projection;
    const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
    // By a shuffle, so that the compiler takes branches on it for ones that no lanes part at.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
    const int unit = threadIdx.x % kLanes, column = unit * 8;
    const bool inside = column < head_dim;
    const int outside = inside ? 0 : -1;
    // A chunk's groups of lanes.
    const int group = threadIdx.x / kLanes, parts = 1 << plan.parts_log2, own_part = group & (parts - 1);
    const int lanes = min(kWarpSize, kLanes * parts);
    const int warps_log2 = max(0, plan.parts_log2 - Traits::kGroupsPerWarpLog2), warps = 1 << warps_log2;

    struct Chunk {
        int first_token, height, width; // as far as it lies in the grid
    };
    const auto chunk_at = [&](const ChunkCursor& at) {
        const int y = at.y * plan.chunk.height, x = at.x * plan.chunk.width;
        const int height = min(plan.chunk.height, static_cast<int>(g.grid_height) - y);
        return Chunk{
            .first_token = static_cast<int>(g.num_prefix_tokens) + y * grid_width + x,
            .height = at.batch < plan.batches ? height : 0,
            .width = grid_width - x,
        };
    };
    // The token that this lane's group takes in a pass; negative: none.
    const auto token_of = [&](const Chunk& chunk, int pass) {
        const int member = (pass << plan.parts_log2) + own_part;
        const int y = divide(member, plan.chunk.width_reciprocal), x = member - y * plan.chunk.width;
        return (y < chunk.height) & (x < chunk.width) ? chunk.first_token + y * grid_width + x : -1;
    };

    // Begins to copy the next tokens' keys and values.
    const int first_index = blockIdx.x * (Traits::kGroups >> plan.parts_log2);
    ChunkCursor at = plan.cursor(first_index + (group >> plan.parts_log2));
    struct {
        ChunkCursor at;
        int pass;
        Chunk chunk;
        const S *keys, *values;
        int token;      // of pass `unit` of kLanes; negative: none, or padding
        uint32_t valid; // of the last passes with unit % kUnroll, a bit each
    } ahead{.at = at};
    const int key_stride = static_cast<int>(p.key.token_stride * sizeof(S));
    const int value_stride = static_cast<int>(p.value.token_stride * sizeof(S));
    const auto load = [&](int slot) {
        const int first = ahead.pass % kLanes;
        if (ahead.pass == 0) {
            ahead.chunk = chunk_at(ahead.at);
            ahead.keys = head_rows<S>(p.key, ahead.at.batch, ahead.at.head) + column;
            ahead.values = head_rows<S>(p.value, ahead.at.batch, ahead.at.head) + column;
        }
        if (first == 0) {
            ahead.token = token_of(ahead.chunk, ahead.pass + unit);
            if (p.key_padding_mask && ahead.token >= 0 &&
                p.key_padding_mask[int64_t{ahead.at.batch} * num_tokens + ahead.token])
                ahead.token = -1;
        }
        const uint32_t to = shared_address(&shared.rows[slot][0][0][threadIdx.x]);
        constexpr uint32_t kRow = sizeof(shared.rows[0][0][0]);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int token = __shfl_sync(0xffffffffu, ahead.token, first + u, kLanes) | outside;
            copy_async_row(token, key_stride, to + 2 * u * kRow, ahead.keys);
            copy_async_row(token, value_stride, to + (2 * u + 1) * kRow, ahead.values);
        }
        const int own_token = __shfl_sync(0xffffffffu, ahead.token, first + unit % kUnroll, kLanes);
        ahead.valid = ahead.valid << 1 | (own_token >= 0);
        copy_commit();
        ahead.pass += kUnroll;
        if (ahead.pass >= plan.passes) ahead.pass = 0, plan.advance(ahead.at);
    };

    Float8 omega{}, grad_beta{};
    const auto load_rows = [&] {
        const bool shares = p.pieces > 1; // the pieces' sum, between the groups of a warp that have one chunk
        if (at.batch < plan.batches && inside) {
            const int row = plan.row(at);
            const int64_t gradient_row =
                landmark_row(p, plan.rows * plan.columns, row, at.batch * plan.heads + at.head);
            omega = load8(static_cast<const float*>(p.omega_rows) + (int64_t{row} * head_dim + column));
            grad_beta =
                load_pieces<S>(p, gradient_columns<S>(p, p.grad_landmark_value, gradient_row, column),
                               shares ? threadIdx.x % lanes / kLanes : 0, shares ? lanes / kLanes : 1);
        }
        if (!shares) return;
        for (int offset = kLanes; offset < lanes; offset *= 2)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                grad_beta.x[i] += __shfl_xor_sync(0xffffffffu, grad_beta.x[i], offset);
    };

    for (int slot = 0; slot < kSlots; ++slot) load(slot);
    load_rows();
    int slot = 0;
    const int indices = gridDim.x * (Traits::kGroups >> plan.parts_log2);
    const int first_of_warp = first_index + (warp * Traits::kGroupsPerWarp >> plan.parts_log2);
    for (int index = first_of_warp, parity = 0; index < plan.total; index += indices, parity ^= 1) {
        const Chunk chunk = chunk_at(at);
        const bool exists = chunk.height > 0;
        const int bh = at.batch * plan.heads + at.head;
        const int row = plan.row(at);
        const int64_t to = int64_t{row} * head_dim + column;
        float* const token_weight = static_cast<float*>(p.token_weight) + int64_t{bh} * num_tokens;
        float* const token_grad = static_cast<float*>(p.token_grad) + int64_t{bh} * num_tokens;
        const auto store_row = [&](void* rows, const Float8& x) {
            *reinterpret_cast<uint4*>(static_cast<S*>(rows) + to) = pack8<S>(x);
        };
        if (exists && inside) {
            if (own_part == 0) store_row(p.omega, omega);
            if (own_part == parts - 1 && !p.rounded_gradients) store_row(p.grad_beta, grad_beta);
        }
        plan.advance(at);

        // A running softmax, in units of log 2: the sums of passes with unit % kUnroll, those of keys of all.
        float maximum = -kInfinity, sum = 0, sum_g = 0;
        Float8 sum_k{}, sum_gk{};
        const auto shift_of = [](float maximum) { return maximum == -kInfinity ? 0.0f : maximum; };
#pragma unroll 1
        for (int pass = 0; pass < plan.passes; pass += kUnroll) {
            copy_wait<kSlots - 1>();
            uint4 key_row[kUnroll];
            float products[kUnroll] = {}, products_g[kUnroll] = {};
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                key_row[u] = shared.rows[slot][u][0][threadIdx.x];
                const Float8 k = unpack8<S>(key_row[u]), v = unpack8<S>(shared.rows[slot][u][1][threadIdx.x]);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    products[u] += k.x[i] * (omega.x[i] - 0.5f * k.x[i]);
                    products_g[u] += grad_beta.x[i] * v.x[i];
                }
            }
            const bool valid = ahead.valid >> (kSlots - 1) & 1;
            load(slot);
            slot = slot + 1 == kSlots ? 0 : slot + 1;
            float logit = lanes_sum<kLanes>(products) * scale_log2;
            const float token_g = lanes_sum<kLanes>(products_g);
            if (!valid) logit = -kInfinity;
            const float largest = quad_max(fmaxf(maximum, logit)), shift = shift_of(largest);
            const float factor = exp2_approx(maximum - shift);
            maximum = largest;
            const float weight = exp2_approx(logit - shift), weight_g = weight * token_g;
            sum = sum * factor + weight;
            sum_g = sum_g * factor + weight_g;
#pragma unroll
            for (int i = 0; i < 8; ++i) sum_k.x[i] *= factor, sum_gk.x[i] *= factor;
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const float w = __shfl_sync(0xffffffffu, weight, u, kLanes),
                            w_g = __shfl_sync(0xffffffffu, weight_g, u, kLanes);
                const Float8 k = unpack8<S>(key_row[u]);
#pragma unroll
                for (int i = 0; i < 8; ++i) sum_k.x[i] += w * k.x[i], sum_gk.x[i] += w_g * k.x[i];
            }
            // Of kLanes passes each lane keeps one.
            if (pass % kLanes != unit / kUnroll * kUnroll) continue;
            if (pass < kKept * kLanes) {
                shared.kept[pass / kLanes][threadIdx.x] = make_float2(logit, token_g);
            } else if (const int token = token_of(chunk, pass + unit % kUnroll); token >= 0) {
                token_weight[token] = logit;
                token_grad[token] = token_g;
            }
        }
        load_rows();

        // Over all parts.
        const float own_maximum = maximum;
        for (int offset = kLanes; offset < lanes; offset *= 2)
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
        float factor = exp2_approx(own_maximum - shift_of(maximum));
        sum = quad_sum(sum) * factor;
        sum_g = quad_sum(sum_g) * factor;
        for (int offset = kLanes; offset < lanes; offset *= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            sum_g += __shfl_xor_sync(0xffffffffu, sum_g, offset);
        }
        const int first_warp = warp & -warps;
        const auto sync_parts = [&] { sync_threads(1 + (warp >> warps_log2), warps * kWarpSize); };
        if (warps > 1) {
            float4* const of_warps = shared.softmax[parity];
            of_warps[warp] = make_float4(maximum, sum, sum_g, 0);
            sync_parts();
#pragma unroll 1
            for (int i = first_warp; i < first_warp + warps; ++i) maximum = fmaxf(maximum, of_warps[i].x);
            const float shift = shift_of(maximum);
            factor = exp2_approx(own_maximum - shift);
            sum = sum_g = 0;
#pragma unroll 1
            for (int i = first_warp; i < first_warp + warps; ++i) {
                const float4 of_warp = of_warps[i];
                const float its_factor = exp2_approx(of_warp.x - shift);
                sum += its_factor * of_warp.y;
                sum_g += its_factor * of_warp.z;
            }
        }
        const float inverse = sum > 0 ? reciprocal_approx(sum) : 0.0f, mean_g = sum_g * inverse;

        Float8 grad_mu;
        if (has_mu)
            factor *= scale * static_cast<float>(p.mu_scale) * inverse;
        else
            factor = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) grad_mu.x[i] = factor * (sum_gk.x[i] - mean_g * sum_k.x[i]);
        for (int offset = kLanes; offset < lanes; offset *= 2)
#pragma unroll
            for (int i = 0; i < 8; ++i) grad_mu.x[i] += __shfl_xor_sync(0xffffffffu, grad_mu.x[i], offset);
        if (warps > 1) {
            if (threadIdx.x % kWarpSize == unit) store8(shared.grad_mu[warp] + column, grad_mu);
            sync_parts();
#pragma unroll 1
            for (int i = 1; own_part == 0 && i < warps; ++i) {
                const Float8 of_warp = load8(shared.grad_mu[warp + i] + column);
#pragma unroll
                for (int d = 0; d < 8; ++d) grad_mu.x[d] += of_warp.x[d];
            }
        }
        if (exists && own_part == 0 && inside) {
            store8(static_cast<float*>(p.grad_mu) + to, grad_mu);
            if (!has_mu) store_row(p.grad_query_mean, grad_mu);
            if (unit == 0)
                static_cast<float2*>(p.chunk_stats)[row] =
                    make_float2(sum > 0 ? (maximum + log2_approx(sum)) * kLn2 : 0.0f, mean_g);
        }
#pragma unroll 1
        for (int pass = unit; pass < plan.passes; pass += kLanes) {
            const int token = token_of(chunk, pass);
            if (token < 0) continue;
            const float2 kept = pass < kKept * kLanes ? shared.kept[pass / kLanes][threadIdx.x]
                                                      : make_float2(token_weight[token], token_grad[token]);
            const float weight = kept.x == -kInfinity ? 0.0f : exp2_approx(kept.x - maximum) * inverse;
            token_weight[token] = weight;
            token_grad[token] = scale * weight * (kept.y - mean_g);
        }
    }
}

template <class Traits>
ChunkTokensPlan plan_chunk_tokens_bwd(const SummaryParams& p) {
    const Geometry& g = p.shape.geometry;
    const int64_t members = g.chunk_height * g.chunk_width;
    ChunkTokensPlan plan{
        .chunk = BoxShape::of(g.chunk_height, g.chunk_width),
        .heads = static_cast<int>(p.shape.heads),
        .columns = static_cast<int>(g.chunk_columns()),
        .rows = static_cast<int>(g.chunk_rows()),
        .batches = static_cast<int>(p.shape.batch),
        .total = static_cast<int>(p.shape.batch * p.shape.heads * g.num_chunks()),
    };
    // As ends soonest on the GPUs of the day, by the shape alone, where all is shared evenly but for the last
    // chunk of each, and what comes once a chunk takes each of its warps as long as five tokens.
    int64_t least = INT64_MAX;
    for (int log2 = 0; 1 << log2 <= Traits::kGroups; ++log2) {
        const int64_t parts = int64_t{1} << log2, warps = detail::ceil_div(parts, Traits::kGroupsPerWarp),
                      passes = detail::ceil_div(members, parts);
        const int64_t time =
            (passes + 5 * warps) * (plan.total * parts + 132 * Traits::kCtasPerSm * Traits::kGroups);
        if (time < least) least = time, plan.parts_log2 = log2, plan.passes = static_cast<int>(passes);
    }
    return plan;
}

template <class S, int kHeadDim>
void launch_chunk_tokens_bwd(const SummaryParams& p, cudaStream_t stream) {
    using Traits = ChunkTokensTraits<S, kHeadDim>;
    const auto kernel = chunk_tokens_bwd_kernel<Traits>;
    static LimitsOf limits;
    limits(kernel);
    const int64_t most = int64_t{multiprocessors()} * Traits::kCtasPerSm;
    ChunkTokensPlan plan = plan_chunk_tokens_bwd<Traits>(p);
    if (plan.total == 0) return;
    const int at_a_time = Traits::kGroups >> plan.parts_log2; // chunks of a block
    const int64_t blocks = detail::min(most, detail::ceil_div(plan.total, at_a_time));
    plan.step = plan.cursor(static_cast<int>(blocks) * at_a_time);
    launch_dependent(kernel, blocks, Traits::kThreads, sizeof(typename Traits::Shared), stream, p, plan);
}

} // namespace eva_attn::cuda::mma
