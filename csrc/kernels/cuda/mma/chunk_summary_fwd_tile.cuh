// Landmarks of small chunks, forward. A warp takes as many chunks of a batch as fit into its slots for
// tokens, eight at most, and needs no other warp. The members' rows lie in shared memory; all that belongs to
// the chunks is in fragments of tensor cores, a chunk in each row, so that a product's result is the next
// one's factor: sums of queries and keys over the members, projections of the means, the members' logits,
// sums of values. Where a float is a factor, its high half is in the first eight rows of an operand and its
// low half in the last eight. Once used, queries, then keys, then values give way to those of the warp's next
// tile, which arrive behind the arithmetic.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/mma/chunk_summary_fwd.cuh"

namespace eva_attn::cuda::mma {

// What does not depend on the number of slots.
struct SummaryTile {
    static constexpr int kHeadDim = 64, kMaxChunks = 8;
    static constexpr int kTiles = kHeadDim / 8, kSteps = kHeadDim / 16; // of a product's columns, of its sums
    static constexpr int kLanes = kHeadDim / 8, kRowsPerCopy = kWarpSize / kLanes, kRowBytes = 2 * kHeadDim;

    // Floats [8, 64], of chunks by channels or by slots: with group = lane / 4 and pair = 2 * (lane % 4), a
    // lane holds columns pair and pair + 1 of every eight in row `group`.
    using EightRows = float[kTiles][2];
    using Factor = uint32_t[kSteps][4]; // such ones as left factors of products
    using Weights = ProjectionWeights<kHeadDim>;
};

// Chunks of up to four members fill 32 slots, which leaves room for more warps.
template <int kSlots_>
struct SummaryTileTraits : SummaryTile {
    static constexpr int kSlots = kSlots_, kSlotTiles = kSlots / 8, kSlotSteps = kSlots / 16;
    static constexpr int kOwned = kSlots / kWarpSize; // slots that a lane finds the tokens of
    static_assert(kSlots >= kMaxChunks * kFewMembers);
    static constexpr int kWarps = kSlots == 32 ? 12 : 8, kThreads = kWarps * kWarpSize; // at most
    static constexpr int kFewestWarps = kSlots == 32 ? 4 : 8; // with fewer, other kernels are faster
    // Of shared memory: the key's projection and the query's; a warp's rows of queries, keys and values.
    static constexpr int kWeightsBytes = 2 * sizeof(Weights), kWarpBytes = 3 * kSlots * kRowBytes;
    static_assert(kWeightsBytes % kRowBytes == 0);
    static_assert(kWeightsBytes + kFewestWarps * kWarpBytes <= 99 << 10 || kSlots > 32); // what all GPUs have
};

struct SummaryTilePlan {
    ChunkBoxes chunks;
    uint32_t size_reciprocal; // of the members
    int chunks_per_tile, tiles_per_batch, num_tiles;
};

template <class S, int kTiles>
__device__ inline void split(uint32_t (&a)[kTiles / 2][4], const float (&x)[kTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        const SplitPair pair = split<S>(x[n][0], x[n][1]);
        a[n / 2][n % 2 * 2] = pair.high;
        a[n / 2][n % 2 * 2 + 1] = pair.low;
    }
}
__device__ inline float add_halves(const float (&product)[4], int i) { return product[i] + product[i + 2]; }

// The first `columns` of a row, in S.
template <class S>
__device__ inline void store_row(S* row, const SummaryTile::EightRows& x, int columns) {
    const int first = exchanged_column();
#pragma unroll
    for (int n = 0; n < SummaryTile::kTiles; n += 2) {
        const uint2 four = exchange_pairs(pack<S>(x[n][0], x[n][1]), pack<S>(x[n + 1][0], x[n + 1][1]));
        if (8 * n < columns - first) *reinterpret_cast<uint2*>(row + first + 8 * n) = four;
    }
}

// The rows' projection. Without `has_low` the low halves of weights are 0.
__device__ inline void project(SummaryTile::EightRows& x, const SummaryTile::Weights& weights, int head_dim,
                               float eps, bool norm, bool has_low) {
    constexpr int kHeadDim = SummaryTile::kHeadDim, kTiles = SummaryTile::kTiles,
                  kSteps = SummaryTile::kSteps;
    using Rows = SplitRows<kHeadDim>;
    const int lane = threadIdx.x % kWarpSize, pair = lane % 4 * 2;
    const auto vector = [&](const float (&data)[kHeadDim], int n) {
        return *reinterpret_cast<const float2*>(data + place_of_float<kHeadDim>(8 * n + pair));
    };
    SummaryTile::Factor a;
    split<__nv_bfloat16>(a, x);
    const uint32_t rows = weights.linear().address(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    float sum = 0, squares = 0;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
        float product[2][4] = {};
#pragma unroll
        for (int half = 1; half >= 0; --half)
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                if (half == 1 && !has_low) continue;
                uint32_t b[4];
                load_matrix(b, (rows ^ 32 * k) + 8 * n * Rows::kRowBytes + half * Rows::kLowBytes);
                multiply_add<__nv_bfloat16>(product[0], a[k], b[0], b[1]);
                multiply_add<__nv_bfloat16>(product[1], a[k], b[2], b[3]);
            }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 bias = vector(weights.bias, n + i);
            x[n + i][0] = add_halves(product[i], 0) + bias.x;
            x[n + i][1] = add_halves(product[i], 1) + bias.y;
            sum += x[n + i][0] + x[n + i][1];
        }
    }
    if (!norm) return;
    const float reciprocal_dim = 1.0f / static_cast<float>(head_dim), mean = quad_sum(sum) * reciprocal_dim;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            x[n][i] -= 8 * n < head_dim ? mean : 0.0f;
            squares += x[n][i] * x[n][i];
        }
    const float rstd = rsqrtf(quad_sum(squares) * reciprocal_dim + eps);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        const float2 factor = vector(weights.norm_weight, n), shift = vector(weights.norm_bias, n);
        x[n][0] = x[n][0] * rstd * factor.x + shift.x;
        x[n][1] = x[n][1] * rstd * factor.y + shift.y;
    }
}

template <class S, class Traits>
__device__ inline void summarise_tiles(const SummaryParams& p, const SummaryTilePlan& plan, char* memory) {
    constexpr int kSlots = Traits::kSlots, kTiles = Traits::kTiles, kSteps = Traits::kSteps,
                  kSlotTiles = Traits::kSlotTiles, kSlotSteps = Traits::kSlotSteps, kOwned = Traits::kOwned;
    constexpr int kQuery = 0, kKey = 1, kValue = 2;
    auto* const weights = reinterpret_cast<SummaryTile::Weights*>(memory);
    // By a shuffle, so that the compiler takes branches on it for ones that no lanes part at.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    const Tile<S, Traits::kHeadDim> own_rows{
        reinterpret_cast<S*>(memory + Traits::kWeightsBytes + warp * Traits::kWarpBytes)};
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const bool has_mu = !p.has_projection || p.has_query_projection;

    // Of the slots that this lane finds the tokens of, which are the `unit`-th of the rows that its eight
    // lanes copy: which chunk's, and where in it.
    const int unit = lane % Traits::kLanes, outside = unit * 8 < head_dim ? 0 : -1;
    int slot_chunk[kOwned], slot_y[kOwned], slot_x[kOwned];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        const int slot = i * kWarpSize + unit * Traits::kRowsPerCopy + lane / Traits::kLanes;
        const int chunk = divide(slot, plan.size_reciprocal),
                  member = slot - chunk * plan.chunks.members.size();
        slot_chunk[i] = chunk;
        slot_y[i] = divide(member, plan.chunks.members.width_reciprocal);
        slot_x[i] = member - slot_y[i] * plan.chunks.members.width;
    }
    struct Chunks {
        int batch;
        int row;               // of landmarks, of chunk `lane`, negative where there is none
        int offset[3][kOwned]; // of this lane's tokens, in 16 bytes, negative where there is none
        uint32_t valid[kOwned];
    };
    const auto find = [&](int tile) {
        Chunks found;
        found.batch = static_cast<unsigned>(tile) / static_cast<unsigned>(plan.tiles_per_batch);
        const int index = (tile - found.batch * plan.tiles_per_batch) * plan.chunks_per_tile + lane;
        const int chunk = static_cast<unsigned>(index) / static_cast<unsigned>(heads);
        const bool exists = tile < plan.num_tiles && lane < plan.chunks_per_tile && chunk < plan.chunks.count;
        const int own_head = exists ? index - chunk * heads : -1;
        const TokenBox box = plan.chunks.box(chunk);
        found.row = exists ? (found.batch * heads + own_head) * plan.chunks.count + chunk : -1;
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
            const int head = __shfl_sync(0xffffffffu, own_head, slot_chunk[i]);
            const int y = __shfl_sync(0xffffffffu, box.y0, slot_chunk[i]) + slot_y[i];
            const int x = __shfl_sync(0xffffffffu, box.x0, slot_chunk[i]) + slot_x[i];
            const int token = box.num_prefix_tokens + y * box.grid_width + x;
            bool valid = head >= 0 && static_cast<unsigned>(y) < static_cast<unsigned>(box.grid_height) &&
                         static_cast<unsigned>(x) < static_cast<unsigned>(box.grid_width);
            if (p.key_padding_mask && valid)
                valid = !p.key_padding_mask[found.batch * p.shape.geometry.num_tokens() + token];
            found.valid[i] = __ballot_sync(0xffffffffu, valid);
            const auto offset = [&](const Rows& rows) {
                return valid ? head * static_cast<int>(rows.head_stride / 8) +
                                   token * static_cast<int>(rows.token_stride / 8)
                             : -1;
            };
            found.offset[kQuery][i] = offset(p.query);
            found.offset[kKey][i] = offset(p.key);
            found.offset[kValue][i] = offset(p.value);
        }
        return found;
    };
    const uint32_t first_copy = shared_address(own_rows.unit(lane / Traits::kLanes, unit));
    const auto copy = [&](int which, const Rows& rows, const Chunks& chunks, bool wanted) {
        if (wanted) {
            const S* const column = head_rows<S>(rows, chunks.batch, 0) + unit * 8;
#pragma unroll
            for (int i = 0; i < kSlots / Traits::kRowsPerCopy; ++i) {
                const int offset = __shfl_sync(0xffffffffu, chunks.offset[which][i / Traits::kLanes],
                                               i % Traits::kLanes, Traits::kLanes);
                // Every other four rows are permuted the other way round.
                const uint32_t to = (first_copy ^ i % 2 * 64) +
                                    (which * kSlots + i * Traits::kRowsPerCopy) * Traits::kRowBytes;
                copy_async_row(offset | outside, sizeof(uint4), to, column);
            }
        }
        copy_commit();
    };

    wait_for_dependencies();
    const int step = gridDim.x * (blockDim.x / kWarpSize);
    int tile = blockIdx.x + gridDim.x * warp;
    Chunks next = find(tile);
    copy(kQuery, p.query, next, has_mu && tile < plan.num_tiles);
    copy(kKey, p.key, next, tile < plan.num_tiles);
    copy(kValue, p.value, next, tile < plan.num_tiles);
    const auto load_weights = [&](auto threads) {
        if (threadIdx.x >= threads) return;
        if (p.has_projection) weights[0].template load<S, threads>(p.key_projection, head_dim);
        if (p.has_query_projection) weights[1].template load<S, threads>(p.query_projection, head_dim);
    };
    using Few = std::integral_constant<int, Traits::kFewestWarps * kWarpSize>;
    using Many = std::integral_constant<int, 256>;
    blockDim.x < Many::value ? load_weights(Few{}) : load_weights(Many{});
    __syncthreads();

    // Slots are bits where `Chunks::valid` has them; shifted by `first_bit`, those of the columns pair and
    // pair + 1 of every eight are at the same places for all lanes.
    const int group = lane / 4, pair = lane % 4 * 2, first_bit = lane % 2 * 16 + lane % 4 / 2;
    const auto column_bit = [](uint32_t bits, int n, int i) { return bits >> (8 * i + n % 4 * 2) & 1; };
    uint32_t own_slots[kOwned] = {}; // of the chunk in this lane's row of eight
#pragma unroll
    for (int i = 0; i < kOwned; ++i)
#pragma unroll
        for (int chunk = 0; chunk < Traits::kMaxChunks; ++chunk) {
            const uint32_t slots = __ballot_sync(0xffffffffu, slot_chunk[i] == chunk);
            if (chunk == group) own_slots[i] = slots;
        }
    uint32_t belongs[kSlotSteps][2]; // [8 chunks, kSlots]: 1 where the slot is the chunk's
    const uint32_t ones = pack<S>(1.0f, 1.0f);
#pragma unroll
    for (int n = 0; n < kSlotTiles; ++n) {
        const uint32_t bits = own_slots[n / 4] >> first_bit;
        belongs[n / 2][n % 2] =
            (column_bit(bits, n, 0) ? ones & 0xffffu : 0) | (column_bit(bits, n, 1) ? ones & 0xffff0000u : 0);
    }
    // Of the matrices of 16 slots and of 16 channels, those from 8 `first_unit` onward.
    const uint32_t first_matrix = shared_address(own_rows.unit(lane % 16, lane / 16));
    const auto address = [&](int which, int s, int first_unit) {
        return (first_matrix ^ 16 * first_unit) + (which * kSlots + 16 * s) * Traits::kRowBytes;
    };
    const float scale = static_cast<float>(p.scale) * kLog2e, mu_scale = static_cast<float>(p.mu_scale);
    const auto eps = static_cast<float>(p.norm_eps);
    const bool has_low = has_low_halves(p.key_projection);

    for (; tile < plan.num_tiles; tile += step) {
        const int row = __shfl_sync(0xffffffffu, next.row, group);
        const int64_t to = static_cast<int64_t>(row) * head_dim;
        uint32_t valid[kOwned];
        int count = 0;
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
            valid[i] = next.valid[i] & own_slots[i];
            count += __popc(valid[i]);
            valid[i] >>= first_bit;
        }
        const float factor = 1.0f / static_cast<float>(p.mean_divisor ? p.mean_divisor : max(count, 1));
        const int columns = row >= 0 ? head_dim : 0; // to be written
        SummaryTile::EightRows omega = {};
        if (p.noise) {
            const auto* const from = static_cast<const float*>(p.noise) + (to + pair);
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
                if (8 * n < columns) {
                    const float2 x = *reinterpret_cast<const float2*>(from + 8 * n);
                    omega[n][0] = x.x, omega[n][1] = x.y;
                }
        }

        next = find(tile + step);
        const bool more = tile + step < plan.num_tiles;

        // Means.
        copy_wait<1>(); // all but the values
        __syncwarp();
        float sums[kTiles][4] = {}; // of keys in the first eight rows, of queries in the last
        const auto add_members = [&](int which, int s, const uint32_t (&a)[4]) {
#pragma unroll
            for (int n = 0; n < kTiles; n += 2) {
                uint32_t b[4];
                load_matrix_transposed(b, address(which, s, n));
                multiply_add<S>(sums[n], a, b[0], b[1]);
                multiply_add<S>(sums[n + 1], a, b[2], b[3]);
            }
        };
        if (has_mu) {
#pragma unroll
            for (int s = 0; s < kSlotSteps; ++s) add_members(kQuery, s, {0, belongs[s][0], 0, belongs[s][1]});
        }
        __syncwarp();
        copy(kQuery, p.query, next, has_mu && more);
#pragma unroll
        for (int s = 0; s < kSlotSteps; ++s) add_members(kKey, s, {belongs[s][0], 0, belongs[s][1], 0});
        SummaryTile::EightRows key, query;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                key[n][i] = sums[n][i] * factor;
                query[n][i] = sums[n][i + 2] * factor;
            }

        const auto store_floats = [&](void* rows, const SummaryTile::EightRows& x) {
            auto* const row = static_cast<float*>(rows) + (to + pair);
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
                if (8 * n < columns) *reinterpret_cast<float2*>(row + 8 * n) = float2{x[n][0], x[n][1]};
        };
        if (!p.rounded_mean) store_floats(p.key_mean, key);
        if (has_mu)
            p.rounded_mean ? store_row(static_cast<S*>(p.query_mean) + to, query, columns)
                           : store_floats(p.query_mean, query);
        // Landmark keys and omega, both projections by the same code.
        auto& x = key;
#pragma unroll 1
        for (int which = 0; which <= static_cast<int>(has_mu); ++which) {
            if (p.has_projection)
                project(x, weights[which], head_dim, eps,
                        (which ? p.query_projection : p.key_projection).norm_weight != nullptr, has_low);
            if (which == 0) store_row(static_cast<S*>(p.landmark_key) + to, x, columns);
            if (!has_mu) break;
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    omega[n][i] += mu_scale * x[n][i];
                    x[n][i] = query[n][i];
                }
        }
        if (p.omega_rows) store_floats(p.omega_rows, omega);

        // Weights of the members, by logits in units of log 2.
        float logit[kSlotTiles][2]; // [8 chunks, kSlots], like EightRows
        float largest = -kInfinity, total = 0.0f;
        {
            SummaryTile::Factor a;
            split<S>(a, omega);
#pragma unroll
            for (int s = 0; s < kSlotSteps; ++s) {
                float products[2][4] = {}, squares[2][4] = {}; // squared norms of keys are on the diagonal
#pragma unroll
                for (int k = 0; k < kSteps; ++k) {
                    uint32_t b[4];
                    load_matrix(b, address(kKey, s, 2 * k));
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        multiply_add<S>(squares[n], b, b[n], b[n + 2]);
                        multiply_add<S>(products[n], a[k], b[n], b[n + 2]);
                    }
                }
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float norm =
                            __shfl_sync(0xffffffffu, squares[n][2 * n + i], 9 * (lane % 4) + 4 * i);
                        float& x = logit[2 * s + n][i];
                        x = scale * (add_halves(products[n], i) - 0.5f * norm);
                        if (!column_bit(valid[(2 * s + n) / 4], 2 * s + n, i)) x = -kInfinity;
                        largest = fmaxf(largest, x);
                    }
            }
        }
        __syncwarp();
        copy(kKey, p.key, next, more);
        largest = quad_max(largest);
        if (largest == -kInfinity) largest = 0.0f;
#pragma unroll
        for (int n = 0; n < kSlotTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) total += logit[n][i] = exp2_approx(logit[n][i] - largest);
        total = quad_sum(total);

        // Landmark values.
        uint32_t a[kSlotSteps][4];
        split<S>(a, logit);
        copy_wait<2>(); // this tile's
        __syncwarp();
        SummaryTile::EightRows value;
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            float products[2][4] = {};
#pragma unroll
            for (int s = 0; s < kSlotSteps; ++s) {
                uint32_t b[4];
                load_matrix_transposed(b, address(kValue, s, n));
                multiply_add<S>(products[0], a[s], b[0], b[1]);
                multiply_add<S>(products[1], a[s], b[2], b[3]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) value[n + i / 2][i % 2] = add_halves(products[i / 2], i % 2);
        }
        __syncwarp();
        copy(kValue, p.value, next, more);
        const float reciprocal = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) value[n][0] *= reciprocal, value[n][1] *= reciprocal;
        store_row(static_cast<S*>(p.landmark_value) + to, value, columns);
    }
}

template <class S, int kSlots>
__global__ void __launch_bounds__(SummaryTileTraits<kSlots>::kThreads, 1)
    chunk_summary_fwd_tile_kernel(const __grid_constant__ SummaryParams p,
                                  const __grid_constant__ SummaryTilePlan plan) {
    extern __shared__ __align__(1024) char memory[];
    summarise_tiles<S, SummaryTileTraits<kSlots>>(p, plan, memory);
}

// False where the chunks are not small, or a block can't have enough shared memory.
template <class S, int kSlots>
bool launch_chunk_summary_fwd_tile(const SummaryParams& p, const ChunkBoxes& chunks, cudaStream_t stream) {
    using Traits = SummaryTileTraits<kSlots>;
    const Geometry& g = p.shape.geometry;
    const int members = chunks.members.size();
    // The 16-byte units of a batch are numbered by int.
    const auto countable = [&](const Rows& rows) {
        return (p.shape.heads - 1) * rows.head_stride + (g.num_tokens() - 1) * rows.token_stride <=
               int64_t{8} * INT_MAX;
    };
    if (p.shape.head_dim > Traits::kHeadDim || members > kSlots || !countable(p.query) || !countable(p.key) ||
        !countable(p.value))
        return false;

    const auto kernel = chunk_summary_fwd_tile_kernel<S, kSlots>;
    static LimitsOf limits_of;
    const int warps = std::min(Traits::kWarps,
                               (limits_of(kernel).shared_bytes - Traits::kWeightsBytes) / Traits::kWarpBytes);
    if (warps < Traits::kFewestWarps) return false;
    const int chunks_per_tile = std::min(kSlots / members, Traits::kMaxChunks);
    const int64_t tiles_per_batch = detail::ceil_div(g.num_chunks() * p.shape.heads, chunks_per_tile);
    const SummaryTilePlan plan{
        .chunks = chunks,
        .size_reciprocal = reciprocal(members),
        .chunks_per_tile = chunks_per_tile,
        .tiles_per_batch = static_cast<int>(tiles_per_batch),
        .num_tiles = static_cast<int>(tiles_per_batch * p.shape.batch),
    };
    if (plan.num_tiles == 0) return true;
    launch_dependent(kernel, std::min(plan.num_tiles, multiprocessors()), warps * kWarpSize,
                     Traits::kWeightsBytes + warps * Traits::kWarpBytes, stream, p, plan);
    return true;
}

template <class S>
bool launch_chunk_summary_fwd_tile(const SummaryParams& p, cudaStream_t stream) {
    const ChunkBoxes chunks = ChunkBoxes::of(p.shape.geometry);
    return chunks.members.size() <= kFewMembers ? launch_chunk_summary_fwd_tile<S, 32>(p, chunks, stream)
                                                : launch_chunk_summary_fwd_tile<S, 64>(p, chunks, stream);
}

} // namespace eva_attn::cuda::mma
