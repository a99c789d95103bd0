// Backward of the summaries in two kernels, the second of which is here: from the gradients of landmark keys
// and of mu through the projections.
#pragma once

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/chunk_tokens_bwd.cuh"
#include "kernels/cuda/mma/projection.cuh"

namespace eva_attn::cuda::mma {

// In products a warp takes 16 columns of up to kMaxChunks rows, one a chunk; between them kLanes lanes take
// a row.
template <class S_, int kHeadDim_>
struct ProjectionTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kLanes = kHeadDim / 8;
    static constexpr int kWarps = kHeadDim / 16, kThreads = kWarps * kWarpSize;
    static constexpr int kRowTiles = kHeadDim == 64 ? 2 : 1, kMaxChunks = 16 * kRowTiles;
    static constexpr int kCtasPerSm = kHeadDim == 64 ? 4 : 2;
    static_assert(kThreads / kLanes == 16);

    struct Shared {
        ProjectionWeights<kHeadDim> weights;
        alignas(4 * kHeadDim) __nv_bfloat16 mean[kMaxChunks * 2 * kHeadDim];
        __nv_bfloat16 grad[kMaxChunks * 2 * kHeadDim]; // of the Linear's output, which it held before
        float factor[kMaxChunks];                      // from gradients of means to those of tokens
        uint4 stage[kRowTiles][2][2][kThreads];        // means, gradients of mu
    };
    static_assert(kWarps * kHeadDim * sizeof(float) <= sizeof(Shared::stage));
};

struct SummaryGradPlan {
    BoxShape chunk;
    int chunks, columns; // per (batch, head), and per row of chunks
    int total;           // chunks in all
    int group;           // chunks that go through the projections together
    int divisor;         // of all chunks' means; 0: to be counted

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

// The row that a chunk has in the landmark gradients' first pieces; most often without a division.
__device__ inline int64_t landmark_row(const SummaryParams& p, const SummaryGradPlan& plan, int chunk) {
    const int64_t between = p.pieces * p.global_columns - plan.chunks; // two heads
    return between == 0 ? chunk : chunk + chunk / plan.chunks * between;
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
                grad[i] = load_pieces<S>(p, gradient_columns<S>(p, p.grad_landmark_key,
                                                                landmark_row(p, plan, first + own + 16 * i),
                                                                column));
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
    const Geometry& g = p.shape.geometry;
    SummaryGradPlan plan{
        .chunk = BoxShape::of(g.chunk_height, g.chunk_width),
        .chunks = static_cast<int>(g.num_chunks()),
        .columns = static_cast<int>(g.chunk_columns()),
        .total = static_cast<int>(p.shape.batch * p.shape.heads * g.num_chunks()),
        .group = 1,
        .divisor = static_cast<int>(p.mean_divisor),
    };
    if (p.mean_divisor == 0 && !p.key_padding_mask && g.grid_height % g.chunk_height == 0 &&
        g.grid_width % g.chunk_width == 0)
        plan.divisor = plan.chunk.size();
    // As many groups of chunks as fill the GPUs of the day evenly, by the shape alone.
    const int64_t blocks = 132 * Projections::kCtasPerSm / 2;
    const int64_t rounds = detail::max(1, detail::ceil_div(plan.total, blocks * Projections::kMaxChunks));
    plan.group = static_cast<int>(detail::max(16, detail::ceil_div(plan.total, blocks * rounds)));
    return plan;
}

template <class S, int kHeadDim>
int64_t count_projection_pieces(const SummaryParams& p) {
    return count_projection_blocks<ProjectionTraits<S, kHeadDim>>(plan_chunk_summary_bwd<S, kHeadDim>(p));
}

// Adds the pieces of the landmark gradients, of keys and then of values, to the first; four columns a thread.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_pieces_kernel(const __grid_constant__ SummaryParams p) {
    wait_for_dependencies();
    const int lanes = static_cast<int>(p.shape.head_dim) / 4,
              chunks = static_cast<int>(p.shape.geometry.num_chunks());
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = i / lanes;
    const int64_t heads = p.shape.batch * p.shape.heads, bh = row / chunks, stride = p.global_columns * lanes;
    if (bh >= 2 * heads) return;
    void* const pieces = bh < heads ? p.grad_landmark_key : p.grad_landmark_value;
    auto* const sums =
        static_cast<float4*>(pieces) + bh % heads * p.pieces * stride + row % chunks * lanes + i % lanes;
    float4 sum{};
#pragma unroll 8
    for (int piece = 0; piece < static_cast<int>(p.pieces); ++piece) {
        const float4 x = sums[piece * stride];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    *sums = sum;
}

template <class S, int kHeadDim>
void launch_chunk_summary_bwd(SummaryParams p, cudaStream_t stream) {
    using Projections = ProjectionTraits<S, kHeadDim>;
    const SummaryGradPlan plan = plan_chunk_summary_bwd<S, kHeadDim>(p);
    if (plan.total == 0) return;
    constexpr int kMostPieces = 8; // that both kernels add up themselves
    if (p.pieces > kMostPieces) {
        constexpr int kThreads = 256;
        launch_dependent(sum_pieces_kernel<kThreads>,
                         detail::ceil_div(2 * plan.total * p.shape.head_dim / 4, kThreads), kThreads, 0,
                         stream, p);
        p.global_columns *= p.pieces; // from one head to the next
        p.pieces = 1;
    }
    launch_chunk_tokens_bwd<S, kHeadDim>(p, stream);
    constexpr int kBytes = sizeof(typename Projections::Shared);
    static_assert(kBytes <= 99 << 10); // what every GPU from sm_80 on lets a block have
    static LimitsOf limits;
    limits(chunk_projections_bwd_kernel<Projections>);
    launch_dependent(chunk_projections_bwd_kernel<Projections>,
                     count_projection_blocks<Projections>(plan) * count_projected(p), Projections::kThreads,
                     kBytes, stream, p, plan);
}

} // namespace eva_attn::cuda::mma
