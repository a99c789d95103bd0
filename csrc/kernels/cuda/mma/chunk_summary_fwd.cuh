// Landmarks: the chunks' means, their projections, and the chunks' softmax-weighted sums of values, forward.
//
// A CTA takes blocks of chunk rows in turn and copies the next one while it works on this one. Eight lanes, a
// group, hold a row of a tensor; `parts` groups share a chunk. A lane copies what it reads itself, so that
// copies need no barrier; only sums and projections change hands. All arithmetic is in float; products with
// the projections' weights are as exact as three products of bfloat16 halves.
#pragma once

#include <algorithm>
#include <bit>
#include <mutex>
#include <type_traits>
#include <vector>

#include "kernels/cuda/mma/tile.cuh"

namespace eva_attn::cuda::mma {

template <int kHeadDim>
struct SummaryFwdTraits {
    static constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
    static constexpr int kCtasPerSm = kHeadDim == 64 ? 2 : 1;
    static constexpr int kLanes = 8;                       // of a row
    static constexpr int kUnits = kHeadDim / (8 * kLanes); // 16 bytes of a row each, of a lane
    static constexpr int kGroups = kThreads / kLanes, kGroupsPerWarp = kWarpSize / kLanes;
    static constexpr int kUnroll = 4; // members of a part that are worked on together
    static constexpr int kMaxMembersPerPart = 8 / kUnits;
    static constexpr int kSteps = kHeadDim / 16, kRowUnits = kHeadDim / 8;
    static_assert(kHeadDim == 64 || kHeadDim == 128);

    // Two vectors for each part of a chunk that lies in a warp of its own.
    using Partial = float[2][kHeadDim];
};

// n / d for n below 2^31.
struct Divisor {
    uint32_t multiplier;
    int shift;

    static Divisor of(int d) {
        const auto shift = static_cast<int>(std::bit_width(static_cast<unsigned>(d - 1)));
        return Divisor{static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d), shift};
    }
    __device__ int divide(int n) const {
        return static_cast<int>(__umulhi(2 * static_cast<unsigned>(n), multiplier) >> shift);
    }
};

struct SummaryFwdPlan {
    // A tensor's rows; strides in bytes.
    struct Source {
        const char* data;
        int64_t batch_stride, head_stride;
        uint32_t token_stride;
    };
    Source query, key, value;
    BoxShape members;
    Divisor heads_divisor, chunks_divisor, columns_divisor;
    int heads, num_chunks, columns;
    int chunk_height, chunk_width, overlap_y, overlap_x;
    int grid_height, grid_width, num_prefix_tokens;
    int parts_log2, merged_log2; // of a chunk; of its parts in one warp
    int members_per_part;        // of a tile
    int tiles;                   // of a chunk
    int num_rows;                // batch * chunks * heads
    float mean_factor;           // 0: by the number of members
    int num_blocks;
    bool keys_twice; // keys are copied again with the values
    bool two_stages; // a tile is copied while another is worked on

    // Row numbers have the heads fastest, as they lie side by side in memory.
    struct Row {
        int batch, head, chunk;
    };
    __device__ Row row(int index) const {
        const int rest = heads_divisor.divide(index), batch = chunks_divisor.divide(rest);
        return Row{.batch = batch, .head = index - rest * heads, .chunk = rest - batch * num_chunks};
    }
    // Its number in the outputs.
    __device__ int output_row(const Row& row) const {
        return (row.batch * heads + row.head) * num_chunks + row.chunk;
    }
    __device__ TokenBox box(int chunk) const {
        const int y = columns_divisor.divide(chunk);
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

struct alignas(16) Float8 {
    float x[8];
};

template <class S>
__device__ inline Float8 unpack8(const uint4& packed) {
    const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
    Float8 result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<S, __nv_bfloat16>) { // one instruction each
            result.x[2 * i] = __uint_as_float(pairs[i] << 16);
            result.x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
        } else {
            const float2 pair = unpack<S>(pairs[i]);
            result.x[2 * i] = pair.x, result.x[2 * i + 1] = pair.y;
        }
    }
    return result;
}
template <class S>
__device__ inline uint4 pack8(const Float8& x) {
    return uint4{pack<S>(x.x[0], x.x[1]), pack<S>(x.x[2], x.x[3]), pack<S>(x.x[4], x.x[5]),
                 pack<S>(x.x[6], x.x[7])};
}

// Over the eight lanes of a row.
__device__ inline float row_sum(float x) {
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Calls f with a value of the parameters' type.
template <class F>
__device__ inline void with_type(DType dtype, F f) {
    if (dtype == DType::kFloat) return f(float{});
    dtype == DType::kHalf ? f(__half{}) : f(__nv_bfloat16{});
}

template <class W>
__device__ inline float4 load4(const W* data) {
    if constexpr (std::is_same_v<W, float>) {
        return *reinterpret_cast<const float4*>(data);
    } else {
        const uint2 packed = *reinterpret_cast<const uint2*>(data);
        const float2 a = unpack<W>(packed.x), b = unpack<W>(packed.y);
        return float4{a.x, a.y, b.x, b.y};
    }
}

// Two floats as sums of two bfloat16.
struct SplitPair {
    uint32_t high, low;
};
__device__ inline SplitPair split(float x, float y) {
    const uint32_t high = pack<__nv_bfloat16>(x, y);
    const float2 rounded = unpack<__nv_bfloat16>(high);
    return SplitPair{high, pack<__nv_bfloat16>(x - rounded.x, y - rounded.y)};
}

// Adds 16 members of a tensor that a warp has in its slots, four of each group. With chunk = lane % 4,
// c[t][i] and c[t][2 + i] of a lane are columns 16 t + lane / 4 and 8 further of the sum over its warp's
// chunk of that number, of keys (i = 0) or queries (1): `chunk_of` [16 members, 8] has ones in column 2 chunk
// + i.
template <class S, int kHeadDim>
__device__ inline void add_members(float (&c)[kHeadDim / 16][4], const uint4* warp_slots, uint32_t chunk_of) {
    using Traits = SummaryFwdTraits<kHeadDim>;
    const int lane = threadIdx.x % kWarpSize, member = lane % 8 + lane / 16 * 8;
    const int group = member % 4, u = member / 4;
    const uint4* const row = warp_slots + u * Traits::kUnits * Traits::kThreads + group * Traits::kLanes;
    const int permutation = lane / 8 % 2 ^ group ^ u % 2 * 4;
#pragma unroll
    for (int t = 0; t < kHeadDim / 16; ++t) {
        uint32_t a[4];
        load_matrix_transposed(a, row + t / 4 * Traits::kThreads + (2 * t % 8 ^ permutation));
        multiply_add<S>(c[t], a, chunk_of, chunk_of);
    }
}

// The sums of `add_members` without tensor cores, whose zeros times an infinity in one chunk spoil the other
// chunks of the warp: of the four members of each of the `merged` groups from `held_group` on.
template <class S, int kHeadDim>
__device__ inline void sum_members(float (&c)[kHeadDim / 16][4], int which, const uint4* warp_slots,
                                   int held_group, int merged) {
    using Traits = SummaryFwdTraits<kHeadDim>;
#pragma unroll
    for (int i = 0; i < Traits::kRowUnits; ++i) {
        float sum = 0.0f;
#pragma unroll 1
        for (int group = held_group; group < held_group + merged; ++group)
#pragma unroll 1
            for (int u = 0; u < Traits::kUnroll; ++u) {
                const uint4* const unit = warp_slots + (u * Traits::kUnits + i / 8) * Traits::kThreads +
                                          group * Traits::kLanes + (i % 8 ^ group ^ u % 2 * 4);
                sum += static_cast<float>(reinterpret_cast<const S*>(unit)[threadIdx.x % kWarpSize / 4]);
            }
        (which == 0 ? c[i / 2][i % 2 * 2] : c[i / 2][i % 2 * 2 + 1]) = sum;
    }
}

// A [16, 16] of a projection's weight, in bfloat16 halves.
struct WeightFragment {
    uint32_t high[4], low[4];
};

// A warp's share: rows 16 kUnits (warp % 4) onward. Columns are in the order in which lanes hold sums: every
// eighth of them, then the next ones.
template <int kHeadDim, class W>
__device__ inline void load_weights(WeightFragment (&a)[SummaryFwdTraits<kHeadDim>::kUnits][kHeadDim / 16],
                                    const W* weight, int head_dim) {
    using Traits = SummaryFwdTraits<kHeadDim>;
    const int lane = threadIdx.x % kWarpSize, tile = threadIdx.x / kWarpSize % 4 * Traits::kUnits;
    const auto element = [&](int to, int i) {
        const int from = i % Traits::kRowUnits * 8 + i / Traits::kRowUnits;
        return to < head_dim && from < head_dim ? static_cast<float>(weight[to * head_dim + from]) : 0.0f;
    };
#pragma unroll
    for (int t = 0; t < Traits::kUnits; ++t)
#pragma unroll
        for (int k = 0; k < Traits::kSteps; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int to = (tile + t) * 16 + lane / 4 + i % 2 * 8,
                          from = 16 * k + lane % 4 * 2 + i / 2 * 8;
                const SplitPair x = split(element(to, from), element(to, from + 1));
                a[t][k].high[i] = x.high;
                a[t][k].low[i] = x.low;
            }
}

// A lane's columns where a warp has a row.
template <int kHeadDim>
struct alignas(kHeadDim / 8) Columns {
    static constexpr int kCount = kHeadDim / kWarpSize;

    float x[kCount];
};

// Bias and LayerNorm of a projection.
template <int kHeadDim>
struct ProjectionVectors {
    Columns<kHeadDim> bias, norm_weight, norm_bias;
    bool has_norm;

    template <class W>
    __device__ void load(const Projection& projection, int column, int head_dim) {
        const auto vector = [&](const void* data, float otherwise) {
            Columns<kHeadDim> result;
#pragma unroll
            for (int i = 0; i < result.kCount; ++i)
                result.x[i] = data && column + i < head_dim
                                  ? static_cast<float>(static_cast<const W*>(data)[column + i])
                                  : otherwise;
            return result;
        };
        bias = vector(projection.bias, 0.0f);
        norm_weight = vector(projection.norm_weight, 1.0f);
        norm_bias = vector(projection.norm_bias, 0.0f);
        has_norm = projection.norm_weight;
    }
};

__device__ inline void warp_sum(float (&x)[2]) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
#pragma unroll
        for (int i = 0; i < 2; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], offset);
}

// Adds the Linears' biases and applies the LayerNorms, to the key's and the query's landmark side by side.
template <int kHeadDim>
__device__ inline void normalise(const ProjectionVectors<kHeadDim> (&vectors)[2], float eps,
                                 float reciprocal_dim, int inside, Columns<kHeadDim> (&x)[2]) {
    float sum[2] = {}, squares[2] = {};
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
        for (int i = 0; i < x[0].kCount; ++i) sum[which] += x[which].x[i] += vectors[which].bias.x[i];
    warp_sum(sum);
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
        for (int i = 0; i < x[0].kCount; ++i) {
            const float centered = i < inside ? x[which].x[i] - sum[which] * reciprocal_dim : 0.0f;
            squares[which] += centered * centered;
        }
    warp_sum(squares);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const float scale = rsqrtf(squares[which] * reciprocal_dim + eps),
                    center = sum[which] * reciprocal_dim;
        if (!vectors[which].has_norm) continue;
#pragma unroll
        for (int i = 0; i < x[0].kCount; ++i)
            x[which].x[i] = (x[which].x[i] - center) * scale * vectors[which].norm_weight.x[i] +
                            vectors[which].norm_bias.x[i];
    }
}

template <class Vector>
__device__ inline void add_scaled(Vector& x, const Vector& y, float factor) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(x.x) / sizeof(float)); ++i) x.x[i] += factor * y.x[i];
}
template <class Vector>
__device__ inline void multiply(Vector& x, float factor) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(x.x) / sizeof(float)); ++i) x.x[i] *= factor;
}
template <class S, int kHeadDim>
__device__ inline void store_row(S* to, const Columns<kHeadDim>& row) {
#pragma unroll
    for (int i = 0; i < row.kCount; i += 2)
        *reinterpret_cast<uint32_t*>(to + i) = pack<S>(row.x[i], row.x[i + 1]);
}

__device__ inline const char* multiply_add_wide(int index, uint32_t stride, const char* base) {
    uint64_t result;
    asm("mad.wide.u32 %0, %1, %2, %3;\n" : "=l"(result) : "r"(index), "r"(stride), "l"(base));
    return reinterpret_cast<const char*>(result);
}

template <class S, int kHeadDim>
__global__ void __launch_bounds__(SummaryFwdTraits<kHeadDim>::kThreads,
                                  SummaryFwdTraits<kHeadDim>::kCtasPerSm)
    chunk_summary_fwd_kernel(const __grid_constant__ SummaryParams p,
                             const __grid_constant__ SummaryFwdPlan plan) {
    using Traits = SummaryFwdTraits<kHeadDim>;
    using Partial = typename Traits::Partial;
    constexpr int kThreads = Traits::kThreads, kLanes = Traits::kLanes, kUnits = Traits::kUnits;
    constexpr int kUnroll = Traits::kUnroll, kSteps = Traits::kSteps, kRowUnits = Traits::kRowUnits;

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    // This group's row in a block and its part of that; parts in one warp are merged into one partial.
    const int group = threadIdx.x / kLanes, row_in_block = group >> plan.parts_log2;
    const int part = group & ((1 << plan.parts_log2) - 1), merged = 1 << plan.merged_log2;
    const int partials = 1 << (plan.parts_log2 - plan.merged_log2);
    const int partials_per_warp = Traits::kGroupsPerWarp >> plan.merged_log2;
    const int num_partials = Traits::kWarps * partials_per_warp;
    const int rows_per_block = Traits::kGroups >> plan.parts_log2;
    const int first_partial = row_in_block * partials;
    // This lane's columns, and 64 further. Permuted by the group, against bank conflicts of `add_members`.
    const int column = (threadIdx.x % kLanes ^ group % Traits::kGroupsPerWarp) * 8;

    // A stage has `members_per_part` slots of each lane for query (or value), key and value.
    // Those of odd members are permuted, against bank conflicts of `add_members`.
    const auto slot = [](int member, int unit) {
        return (member * kUnits + unit) * kThreads + (threadIdx.x ^ member % 2 * 4);
    };
    const int tensor_slots = plan.members_per_part * kUnits * kThreads;
    const int stage_slots = tensor_slots * (plan.keys_twice ? 2 : 3);
    const int value_slots = plan.keys_twice ? 0 : 2 * tensor_slots;
    extern __shared__ __align__(128) uint4 slots[];
    // Units of the rows of these are permuted by the rows' numbers, against bank conflicts.
    auto* const products = reinterpret_cast<Partial*>(slots + stage_slots * (plan.two_stages ? 2 : 1));
    Partial* const sums = products + num_partials;
    auto* const value_sums = reinterpret_cast<float (*)[kHeadDim]>(sums + num_partials);
    __shared__ float partial_maximum[Traits::kWarps], partial_weight[Traits::kWarps];
    __shared__ int partial_count[Traits::kGroups], output_rows[Traits::kGroups];
    using Row = Columns<kHeadDim>;
    const int row_column = lane * Row::kCount;
    const auto row_of = [&](float* row, int index) -> Row& {
        return *reinterpret_cast<Row*>(row + (row_column ^ index % 8 * 8));
    };

    const int head_dim = static_cast<int>(p.shape.head_dim);
    const auto eps = static_cast<float>(p.norm_eps), reciprocal_dim = 1.0f / static_cast<float>(head_dim);
    const float logit_scale = static_cast<float>(p.scale) * kLog2e;
    const auto mu_scale = static_cast<float>(p.mu_scale);
    const auto mean_factor = [&](int count) {
        return plan.mean_factor > 0.0f ? plan.mean_factor
                                       : reciprocal_approx(static_cast<float>(max(count, 1)));
    };
    const bool has_mu = !p.has_projection || p.has_query_projection;

    // What this group has in a tile: the number of its row in the outputs, -1 if none, and a bit for each
    // member.
    struct Members {
        int row;
        uint32_t valid;
    };
    int next_block = blockIdx.x, next_step = 0, stage = 0;
    // Begins to copy the next tile.
    const auto fetch = [&] {
        Members result{-1, 0};
        if (next_block < plan.num_blocks) {
            const int row = next_block * rows_per_block + row_in_block;
            const auto at = plan.row(min(row, plan.num_rows - 1));
            TokenBox box = plan.box(at.chunk);
            if (row < plan.num_rows) {
                result.row = plan.output_row(at);
            } else {
                box.grid_height = 0;
            }
            // Backward the second time, so that the latest are still in the L2 cache.
            const bool is_first = next_step < plan.tiles;
            const int tile = is_first ? next_step : 2 * plan.tiles - 1 - next_step;
            // Each lane of the group finds one member.
            int own_token =
                box.token(part + ((tile * plan.members_per_part + lane % kLanes) << plan.parts_log2));
            if (p.key_padding_mask && own_token >= 0 &&
                p.key_padding_mask[at.batch * p.shape.geometry.num_tokens() + own_token])
                own_token = -1;
            const uint32_t mine = (1u << plan.members_per_part) - 1;
            result.valid = __ballot_sync(0xffffffffu, own_token >= 0) >> (lane / kLanes * kLanes) & mine;
            const auto start = [&](const SummaryFwdPlan::Source& source) {
                return source.data + static_cast<uint32_t>(at.batch) * source.batch_stride +
                       static_cast<uint32_t>(at.head) * source.head_stride + column * sizeof(S);
            };
            const char* const query = start(plan.query);
            const char* const key = start(plan.key);
            const char* const value = start(plan.value);
            uint4* to = slots + stage * stage_slots;
#pragma unroll 1
            for (int first = 0; first < plan.members_per_part; first += kUnroll) {
                int token[kUnroll];
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    token[u] = __shfl_sync(0xffffffffu, own_token, first + u, kLanes);
                    if (column >= head_dim) token[u] = -1;
                }
                const auto copy = [&](const char* from, uint32_t stride, uint4* to) {
#pragma unroll
                    for (int u = 0; u < kUnroll; ++u) {
                        const char* const row = multiply_add_wide(token[u], stride, from);
#pragma unroll
                        for (int unit = 0; unit < kUnits; ++unit)
                            copy_async_at(unit == 0 || column + 64 * unit < head_dim ? token[u] : -1,
                                          to + slot(u, unit), row + 64 * unit * sizeof(S));
                    }
                };
                if (is_first) copy(query, plan.query.token_stride, to);
                copy(key, plan.key.token_stride, to + tensor_slots);
                if (!plan.keys_twice || !is_first) copy(value, plan.value.token_stride, to + value_slots);
                to += kUnroll * kUnits * kThreads;
            }
        }
        if (++next_step == (plan.keys_twice ? 2 * plan.tiles : 1)) next_step = 0, next_block += gridDim.x;
        copy_commit();
        if (plan.two_stages) stage ^= 1;
        return result;
    };
    Members current{}, pending{};
    // Goes on to the next tile, whose slots it returns.
    const auto advance = [&] {
        __syncwarp();
        const Members fetched = fetch();
        current = plan.two_stages ? pending : fetched;
        pending = fetched;
        plan.two_stages ? copy_wait<1>() : copy_wait<0>();
        __syncwarp();
        return slots + stage * stage_slots;
    };
    if (plan.two_stages) pending = fetch();

    // Half of the warps have the key's projection, half the query's.
    const int projection_idx = warp / 4;
    WeightFragment weight[kUnits][kSteps] = {};
    if (p.has_projection && (projection_idx == 0 || p.has_query_projection))
        with_type(p.key_projection.dtype, [&](auto w) {
            const auto& projection = projection_idx == 0 ? p.key_projection : p.query_projection;
            load_weights<kHeadDim>(weight, static_cast<const decltype(w)*>(projection.weight), head_dim);
        });
    // Members 2 (lane % 4) and the next, groups 2 (lane % 2) and the next, of column lane / 4.
    const auto chunk_of = [&](int which) {
        const int group = lane % 2 * 2;
        const auto is_of_column = [&](int group) {
            return 2 * (group >> plan.merged_log2) + which == lane / 4 ? 1.0f : 0.0f;
        };
        return pack<S>(is_of_column(group), is_of_column(group + 1));
    };
    const uint32_t key_chunk = chunk_of(0), query_chunk = chunk_of(1);

    ProjectionVectors<kHeadDim> vectors[2];
    if (p.has_projection)
        with_type(p.key_projection.dtype, [&](auto w) {
            vectors[0].template load<decltype(w)>(p.key_projection, row_column, head_dim);
            vectors[1].template load<decltype(w)>(p.query_projection, row_column, head_dim);
        });

#pragma unroll 1
    for (int block = blockIdx.x; block < plan.num_blocks; block += gridDim.x) {
        Float8 omega[kUnits] = {}; // begins as the noise
        const auto load_noise = [&] {
            const int row = block * rows_per_block + row_in_block;
            if (!p.noise || row >= plan.num_rows) return;
            const auto* noise = static_cast<const float*>(p.noise) +
                                static_cast<int64_t>(plan.output_row(plan.row(row))) * head_dim + column;
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit)
                if (column + 64 * unit < head_dim)
                    omega[unit] = *reinterpret_cast<const Float8*>(noise + 64 * unit);
        };
        // Early, as it takes long to come; two units would take too many registers until they are used.
        if constexpr (kUnits == 1) load_noise();

        float sum[kSteps][4] = {}; // see `add_members`
        int count = 0;
        uint4* tile_slots = nullptr;
#pragma unroll 1
        for (int tile = 0; tile < plan.tiles; ++tile) {
            tile_slots = advance();
            count += __popc(current.valid);
            const uint4* mine = tile_slots + warp * kWarpSize;
#pragma unroll 1
            for (int first = 0; first < plan.members_per_part; first += kUnroll) {
                add_members<S, kHeadDim>(sum, mine + tensor_slots, key_chunk);
                add_members<S, kHeadDim>(sum, mine, query_chunk);
                mine += kUnroll * kUnits * kThreads;
            }
        }
        for (int offset = kLanes; offset < merged * kLanes; offset *= 2)
            count += __shfl_xor_sync(0xffffffffu, count, offset);
        if (lane % kLanes == 0) {
            if ((part & (merged - 1)) == 0) partial_count[group >> plan.merged_log2] = count;
            if (part == 0) output_rows[row_in_block] = current.row;
        }
        __syncwarp();

        // This lane holds the sums of one partial: columns lane / 4, and every eighth further.
        const int held_group = lane % 4 * merged, held = warp * partials_per_warp + lane % 4;
        const bool holds = held_group < Traits::kGroupsPerWarp;
        const auto element = [&](int which, int i) { return sum[i / 2][i % 2 * 2 + which]; };
        if (merged < Traits::kGroupsPerWarp) {
            float nothing = 0.0f;
#pragma unroll
            for (int i = 0; i < 2 * kRowUnits; ++i) nothing += 0.0f * element(i / kRowUnits, i % kRowUnits);
            if (__any_sync(0xffffffffu, nothing != 0.0f)) {
                const uint4* const mine = tile_slots + warp * kWarpSize;
                if (holds) sum_members<S, kHeadDim>(sum, 0, mine + tensor_slots, held_group, merged);
                if (holds) sum_members<S, kHeadDim>(sum, 1, mine, held_group, merged);
                __syncwarp();
            }
        }
        const int held_count = __shfl_sync(0xffffffffu, count, held_group * kLanes);
        const int held_row = __shfl_sync(0xffffffffu, current.row, held_group * kLanes);
        if (!p.has_projection) __syncthreads(); // the last block's omega has been read
        if (holds) {
            if (p.has_projection) {
                // In the place of queries, which this warp alone has read.
#pragma unroll
                for (int which = 0; which < 2; ++which)
#pragma unroll
                    for (int i = 0; i < kUnits; ++i) {
                        SplitPair x[4];
#pragma unroll
                        for (int d = 0; d < 4; ++d)
                            x[d] = split(element(which, 8 * i + 2 * d), element(which, 8 * i + 2 * d + 1));
                        const int unit = lane / 4 * kUnits + i;
                        uint4* const to = tile_slots + (which * 2 * kUnits + unit / 8) * kThreads +
                                          held * merged * kLanes + (unit % 8 ^ held % 8);
                        to[0] = uint4{x[0].high, x[1].high, x[2].high, x[3].high};
                        to[kUnits * kThreads] = uint4{x[0].low, x[1].low, x[2].low, x[3].low};
                    }
            } else {
#pragma unroll
                for (int which = 0; which < 2; ++which)
#pragma unroll
                    for (int i = 0; i < kRowUnits; ++i)
                        products[held][which][(i ^ held % 8) * 8 + lane / 4] = element(which, i);
            }
            if (partials > 1) {
#pragma unroll
                for (int which = 0; which < 2; ++which)
#pragma unroll
                    for (int i = 0; i < kRowUnits; ++i)
                        sums[held][which][(i ^ held % 8) * 8 + lane / 4] = element(which, i);
            } else if (held_row >= 0) {
                const float factor = mean_factor(held_count);
#pragma unroll
                for (int which = 0; which < 2; ++which)
                    if (which == 0 || has_mu) {
                        float* const mean = static_cast<float*>(which == 0 ? p.key_mean : p.query_mean) +
                                            static_cast<int64_t>(held_row) * head_dim + lane / 4;
#pragma unroll
                        for (int i = 0; i < kRowUnits; ++i)
                            if (8 * i < head_dim) mean[8 * i] = element(which, i) * factor;
                    }
            }
        }
        __syncthreads();

        if (p.has_projection) {
#pragma unroll 1
            for (int first = 0; first < num_partials; first += 8) {
                const uint4* const from = tile_slots + projection_idx * 2 * kUnits * kThreads +
                                          (first + lane % 8) * merged * kLanes;
                float c[kUnits][3][4] = {};
#pragma unroll
                for (int k = 0; k < kSteps; k += 2) {
                    uint32_t high[4], low[4];
                    const uint4* const unit = from + k / 4 * kThreads + ((2 * k % 8 + lane / 8) ^ lane % 8);
                    load_matrix(high, unit);
                    load_matrix(low, unit + kUnits * kThreads);
#pragma unroll
                    for (int i = 0; i < 2; ++i)
#pragma unroll
                        for (int t = 0; t < kUnits; ++t) {
                            const WeightFragment& a = weight[t][k + i];
                            multiply_add<__nv_bfloat16>(c[t][0], a.low, high[2 * i], high[2 * i + 1]);
                            multiply_add<__nv_bfloat16>(c[t][1], a.high, low[2 * i], low[2 * i + 1]);
                            multiply_add<__nv_bfloat16>(c[t][2], a.high, high[2 * i], high[2 * i + 1]);
                        }
                }
#pragma unroll
                for (int t = 0; t < kUnits; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int row = first + lane % 4 * 2 + i % 2;
                        const int to = (warp % 4 * kUnits + t) * 16 + i / 2 * 8 + lane / 4;
                        products[row][projection_idx][to ^ row % 8 * 8] =
                            c[t][0][i] + c[t][1][i] + c[t][2][i];
                    }
            }
            __syncthreads();
        }

        // One row a warp.
        for (int row = warp; row < rows_per_block; row += Traits::kWarps) {
            Row landmark[2] = {};
            int count = 0;
            for (int i = row * partials; i < (row + 1) * partials; ++i) {
                count += partial_count[i];
#pragma unroll
                for (int which = 0; which < 2; ++which)
                    add_scaled(landmark[which], row_of(products[i][which], i), 1.0f);
            }
            const float factor = mean_factor(count);
            multiply(landmark[0], factor);
            multiply(landmark[1], factor);
            if (p.has_projection) normalise(vectors, eps, reciprocal_dim, head_dim - row_column, landmark);
            if (output_rows[row] >= 0 && row_column < head_dim) {
                const int64_t to = static_cast<int64_t>(output_rows[row]) * head_dim + row_column;
                store_row<S>(static_cast<S*>(p.landmark_key) + to, landmark[0]);
                if (partials > 1) {
                    Row mean[2] = {};
                    for (int i = row * partials; i < (row + 1) * partials; ++i) {
                        add_scaled(mean[0], row_of(sums[i][0], i), factor);
                        add_scaled(mean[1], row_of(sums[i][1], i), factor);
                    }
                    *reinterpret_cast<Row*>(static_cast<float*>(p.key_mean) + to) = mean[0];
                    if (has_mu) *reinterpret_cast<Row*>(static_cast<float*>(p.query_mean) + to) = mean[1];
                }
            }
            Row mu{};
            if (has_mu) {
                add_scaled(mu, landmark[0], mu_scale);
                add_scaled(mu, landmark[1], mu_scale);
            }
            row_of(products[row * partials][0], row * partials) = mu;
        }
        if constexpr (kUnits > 1) load_noise();
        __syncthreads();
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit)
            add_scaled(omega[unit],
                       *reinterpret_cast<const Float8*>(products[first_partial][0] +
                                                        ((column + 64 * unit) ^ first_partial % 8 * 8)),
                       1.0f);

        // Softmax over this group's members, in units of log 2.
        Float8 value_sum[kUnits] = {};
        float maximum = -kInfinity, weight_sum = 0.0f;
#pragma unroll 1
        for (int tile = 0; tile < plan.tiles; ++tile) {
            if (plan.keys_twice) tile_slots = advance();
            const uint4* mine = tile_slots;
#pragma unroll 1
            for (int first = 0; first < plan.members_per_part; first += kUnroll) {
                float logit[kUnroll];
                float largest = maximum;
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    float dot = 0.0f, norm = 0.0f;
#pragma unroll
                    for (int unit = 0; unit < kUnits; ++unit) {
                        const Float8 k = unpack8<S>(mine[slot(u, unit) + tensor_slots]);
#pragma unroll
                        for (int i = 0; i < 8; ++i) {
                            dot += omega[unit].x[i] * k.x[i];
                            norm += k.x[i] * k.x[i];
                        }
                    }
                    const bool valid = current.valid >> (first + u) & 1;
                    logit[u] = logit_scale * row_sum(dot - 0.5f * norm);
                    if (!valid) logit[u] = -kInfinity;
                    largest = fmaxf(largest, logit[u]);
                }
                const float shift = largest == -kInfinity ? 0.0f : largest;
                const float rescale = exp2_approx(maximum - shift);
                maximum = largest;
                weight_sum *= rescale;
#pragma unroll
                for (int unit = 0; unit < kUnits; ++unit) multiply(value_sum[unit], rescale);
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    const float weight = exp2_approx(logit[u] - shift);
                    weight_sum += weight;
#pragma unroll
                    for (int unit = 0; unit < kUnits; ++unit)
                        add_scaled(value_sum[unit], unpack8<S>(mine[slot(u, unit) + value_slots]), weight);
                }
                mine += kUnroll * kUnits * kThreads;
            }
        }
        float largest = maximum;
        for (int offset = kLanes; offset < merged * kLanes; offset *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
        const float rescale = largest == -kInfinity ? 0.0f : exp2_approx(maximum - largest);
        weight_sum *= rescale;
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) multiply(value_sum[unit], rescale);
        // The same columns of another group are in another of its lanes.
        for (int offset = kLanes; offset < merged * kLanes; offset *= 2) {
            const int other = offset + offset / kLanes;
            weight_sum += __shfl_xor_sync(0xffffffffu, weight_sum, other);
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    value_sum[unit].x[i] += __shfl_xor_sync(0xffffffffu, value_sum[unit].x[i], other);
        }
        if (partials == 1) {
            const float factor = weight_sum > 0.0f ? reciprocal_approx(weight_sum) : 0.0f;
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                multiply(value_sum[unit], factor);
                if (part == 0 && current.row >= 0 && column + 64 * unit < head_dim)
                    *reinterpret_cast<uint4*>(static_cast<S*>(p.landmark_value) +
                                              static_cast<int64_t>(current.row) * head_dim + column +
                                              64 * unit) = pack8<S>(value_sum[unit]);
            }
            continue;
        }
        if (lane < kLanes) {
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit)
                *reinterpret_cast<Float8*>(value_sums[warp] + column + 64 * unit) = value_sum[unit];
            if (lane == 0) {
                partial_maximum[warp] = largest;
                partial_weight[warp] = weight_sum;
            }
        }
        const int output_row = warp < rows_per_block ? output_rows[warp] : -1;
        __syncthreads();
        if (output_row >= 0 && row_column < head_dim) {
            float largest = -kInfinity, total = 0.0f;
            for (int i = warp * partials; i < (warp + 1) * partials; ++i)
                largest = fmaxf(largest, partial_maximum[i]);
            if (largest == -kInfinity) largest = 0.0f;
            Row beta{};
            for (int i = warp * partials; i < (warp + 1) * partials; ++i) {
                const float rescale = exp2_approx(partial_maximum[i] - largest);
                total += rescale * partial_weight[i];
                add_scaled(beta, *reinterpret_cast<const Row*>(value_sums[i] + row_column), rescale);
            }
            multiply(beta, total > 0.0f ? reciprocal_approx(total) : 0.0f);
            store_row<S>(static_cast<S*>(p.landmark_value) + static_cast<int64_t>(output_row) * head_dim +
                             row_column,
                         beta);
        }
    }
}

struct DeviceLimits {
    int device, multiprocessors, shared_per_cta, shared_per_multiprocessor;
};

inline int device_count() {
    int count = 0;
    cudaGetDeviceCount(&count);
    return count;
}
// Of the current device; the runtime is asked once.
inline DeviceLimits device_limits() {
    static const std::vector<DeviceLimits> limits = [] {
        std::vector<DeviceLimits> limits(device_count());
        for (int i = 0; i < static_cast<int>(limits.size()); ++i) {
            limits[i].device = i;
            cudaDeviceGetAttribute(&limits[i].multiprocessors, cudaDevAttrMultiProcessorCount, i);
            cudaDeviceGetAttribute(&limits[i].shared_per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin, i);
            cudaDeviceGetAttribute(&limits[i].shared_per_multiprocessor,
                                   cudaDevAttrMaxSharedMemoryPerMultiprocessor, i);
        }
        return limits;
    }();
    int device = 0;
    cudaGetDevice(&device);
    return limits[device];
}

template <class S, int kHeadDim>
void launch_chunk_summary_fwd(const SummaryParams& p, cudaStream_t stream) {
    using Traits = SummaryFwdTraits<kHeadDim>;
    const Geometry& g = p.shape.geometry;
    const auto source = [](const Rows& rows) {
        constexpr auto kSize = static_cast<int64_t>(sizeof(S));
        return SummaryFwdPlan::Source{
            .data = static_cast<const char*>(rows.data),
            .batch_stride = rows.batch_stride * kSize,
            .head_stride = rows.head_stride * kSize,
            .token_stride = static_cast<uint32_t>(rows.token_stride * kSize),
        };
    };
    const auto heads = static_cast<int>(p.shape.heads), num_chunks = static_cast<int>(g.num_chunks());
    const auto columns = static_cast<int>(g.chunk_columns());
    if (p.shape.batch * heads * num_chunks == 0) return;
    SummaryFwdPlan plan{
        // Where queries do not matter, keys are at hand.
        .query = source(p.has_projection && !p.has_query_projection ? p.key : p.query),
        .key = source(p.key),
        .value = source(p.value),
        .members =
            BoxShape::of(g.chunk_height + 2 * g.chunk_overlap_y, g.chunk_width + 2 * g.chunk_overlap_x),
        .heads_divisor = Divisor::of(heads),
        .chunks_divisor = Divisor::of(num_chunks),
        .columns_divisor = Divisor::of(columns),
        .heads = heads,
        .num_chunks = num_chunks,
        .columns = columns,
        .chunk_height = static_cast<int>(g.chunk_height),
        .chunk_width = static_cast<int>(g.chunk_width),
        .overlap_y = static_cast<int>(g.chunk_overlap_y),
        .overlap_x = static_cast<int>(g.chunk_overlap_x),
        .grid_height = static_cast<int>(g.grid_height),
        .grid_width = static_cast<int>(g.grid_width),
        .num_prefix_tokens = static_cast<int>(g.num_prefix_tokens),
        .num_rows = static_cast<int>(p.shape.batch * heads * num_chunks),
        .mean_factor = p.mean_divisor ? 1.0f / static_cast<float>(p.mean_divisor) : 0.0f,
    };
    const int members = plan.members.size();
    plan.parts_log2 = Traits::kUnits - 1; // 32 rows of 128 columns would not fit
    while ((Traits::kUnroll << plan.parts_log2) < members && (1 << plan.parts_log2) < Traits::kGroups)
        ++plan.parts_log2;
    const int rows_per_block = Traits::kGroups >> plan.parts_log2;
    while (plan.merged_log2 < plan.parts_log2 && (1 << plan.merged_log2) < Traits::kGroupsPerWarp)
        ++plan.merged_log2;
    plan.num_blocks = static_cast<int>(detail::ceil_div(plan.num_rows, rows_per_block));

    // The largest that fits of: long tiles, where chunks are; two stages; keys and values at once.
    const DeviceLimits limits = device_limits();
    const int num_partials = Traits::kGroups >> plan.merged_log2;
    const auto bytes_with = [&](int members_per_part, bool two_stages, bool keys_twice) {
        plan.members_per_part = members_per_part;
        plan.tiles = static_cast<int>(detail::ceil_div(members, members_per_part << plan.parts_log2));
        plan.two_stages = two_stages;
        plan.keys_twice = keys_twice || plan.tiles > 1;
        const int slots =
            members_per_part * Traits::kUnits * (two_stages ? 2 : 1) * (plan.keys_twice ? 2 : 3);
        const bool is_split = plan.parts_log2 > plan.merged_log2;
        return slots * Traits::kThreads * static_cast<int>(sizeof(uint4)) +
               num_partials * (is_split ? 5 : 2) * kHeadDim * static_cast<int>(sizeof(float));
    };
    constexpr int kStatic = 512, kReserved = 1024; // bytes of a CTA beside these
    const int most = limits.shared_per_cta - kStatic;
    int bytes = 0;
    if (members > Traits::kUnroll << plan.parts_log2)
        bytes = bytes_with(Traits::kMaxMembersPerPart, true, false);
    if (bytes == 0 || bytes > most) bytes = bytes_with(Traits::kUnroll, true, false);
    if (bytes > most) bytes = bytes_with(Traits::kUnroll, false, true);

    const auto kernel = chunk_summary_fwd_kernel<S, kHeadDim>;
    static std::vector<std::once_flag> has_shared_memory(device_count());
    std::call_once(has_shared_memory[limits.device],
                   [&] { cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most); });
    const int ctas_per_multiprocessor =
        std::clamp(limits.shared_per_multiprocessor / (bytes + kStatic + kReserved), 1, Traits::kCtasPerSm);
    const int ctas = std::min(plan.num_blocks, limits.multiprocessors * ctas_per_multiprocessor);
    kernel<<<ctas, Traits::kThreads, bytes, stream>>>(p, plan);
}

} // namespace eva_attn::cuda::mma
