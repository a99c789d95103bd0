// Joint attention over [a window's keys | landmarks], forward, with Hopper's asynchronous copies and
// products: for windows without overlap, of at most 64 tokens or of a sequence's 128, 192 or 256, for up to
// 64 landmarks, and none of the options but causality and the relative bias.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/mma/online_softmax.cuh"
#include "kernels/cuda/mma/persistent.cuh"
#include "kernels/cuda/mma/product.cuh"
#include "kernels/cuda/mma/window_tile.cuh"
#include "kernels/cuda/tma.cuh"

namespace eva_attn::cuda::mma {

// Windows of one tile, and the landmarks, have at most kOnlyColumns columns; 0: windows of several tiles.
template <class S, int kHeadDim, int kOnlyColumns>
struct AttentionSm90Traits {
    static constexpr bool kIsOneTile = kOnlyColumns > 0;
    static constexpr int kColumns = kIsOneTile ? kOnlyColumns : kBlockN; // of a block of scores
    // Warpgroups that compute a tile of queries each; of one more, three warps load and one stores.
    static constexpr int kWarpgroups = kHeadDim == 64 ? 3 + kIsOneTile : 2;
    static constexpr int kConsumers = kWarpgroups * kWarpgroupSize;
    static constexpr int kThreads = kConsumers + kWarpgroupSize;
    static constexpr int kConsumerRegisters = kWarpgroups == 4 ? 112 : kWarpgroups == 3 ? 160 : 232;
    static constexpr int kServiceRegisters = kWarpgroups == 4 ? 24 : kWarpgroups == 3 ? 32 : 40;
    static constexpr int kQuerySlots = 2 * kWarpgroups;
    static constexpr int kMaxTiles = 4, kMaxKeySlots = kIsOneTile ? kQuerySlots : 8, kMaxLandmarkSlots = 3;
    static constexpr int kPanels = kHeadDim / 64; // of 64 columns, in which a tile is kept
    static constexpr int kPanelElements = kBlockM * 64;
    static constexpr int kTileElements = kPanels * kPanelElements;
    static_assert(kBlockM == kBlockN && kPanels * 64 == kHeadDim);

    // What those who compute and store a tile of queries have to know of it.
    struct alignas(16) Place {
        int head, batch, row, column; // of its window
        int tile;                     // of the window
        int sequence;                 // how many the CTA has seen before
    };
    struct alignas(16) Barriers {
        Place place[kQuerySlots];
        // [slot]; a block is the keys and the values of a block of columns. Slots of landmarks come last. In
        // windows of one tile query_full tells of the keys and values, too.
        uint64_t query_full[kQuerySlots], query_empty[kQuerySlots], output_full[kQuerySlots];
        uint64_t block_full[kMaxKeySlots + kMaxLandmarkSlots], block_empty[kMaxKeySlots + kMaxLandmarkSlots];
    };
};

struct AttentionSm90Plan {
    Windows windows;
    int batch, rows;
    WindowShares shares;
    int tiles; // of a window's queries, and of its keys
    int tile_tokens;
    bool has_landmarks;
    int key_slots, landmark_slots;
};

struct AttentionSm90Maps {
    CUtensorMap query, key, value, landmark_key, landmark_value, output;
};

// Without `kHasBias` there is no bias and no causality.
template <class S, int kHeadDim, int kOnlyColumns, bool kHasBias>
struct AttentionSm90 {
    using Traits = AttentionSm90Traits<S, kHeadDim, kOnlyColumns>;
    static constexpr bool kIsOneTile = Traits::kIsOneTile;
    static constexpr int kTile = Traits::kTileElements, kColumns = Traits::kColumns;
    static constexpr int kBiasVectors = kIsOneTile ? kColumns / 8 * kWarpgroupSize : 0;
    using ScoreTile = float[kColumns / 8][4];

    const AttentionParams& p;
    const AttentionSm90Plan& plan;
    const AttentionSm90Maps& maps;
    S *queries, *blocks; // [slot][kTile], [slot][key, value][kTile]
    typename Traits::Barriers& barriers;
    float4* bias_tile; // [kBiasVectors]
    float* bias_table;
    const WindowCursor begin;

    __device__ AttentionSm90(const AttentionParams& p, const AttentionSm90Plan& plan,
                             const AttentionSm90Maps& maps, char* shared)
        : p(p), plan(plan), maps(maps), queries(reinterpret_cast<S*>(shared)),
          blocks(queries + Traits::kQuerySlots * kTile),
          barriers(*reinterpret_cast<typename Traits::Barriers*>(
              blocks + (plan.key_slots + plan.landmark_slots) * 2 * kTile)),
          bias_tile(reinterpret_cast<float4*>(&barriers + 1)),
          bias_table(reinterpret_cast<float*>(bias_tile + kBiasVectors)), begin(WindowCursor::first(plan)) {}

    static int64_t shared_bytes(const AttentionSm90Plan& plan) {
        const int64_t tiles = Traits::kQuerySlots + 2 * (plan.key_slots + plan.landmark_slots);
        return tiles * kTile * sizeof(S) + sizeof(typename Traits::Barriers) + kBiasVectors * sizeof(float4) +
               plan.windows.table_size * sizeof(float);
    }

    // By one thread of each warp.
    __device__ void init_barriers() const {
        constexpr int kWarps = kWarpgroupSize / kWarpSize;
        const int warp = threadIdx.x / kWarpSize;
        constexpr int kAllWarps = Traits::kThreads / kWarpSize;
#pragma unroll 1
        for (int i = warp; i < Traits::kQuerySlots; i += kAllWarps) {
            barrier_init(&barriers.query_full[i], 1);
            barrier_init(&barriers.query_empty[i], 1);
            barrier_init(&barriers.output_full[i], kWarps);
        }
#pragma unroll 1
        for (int i = warp; i < plan.key_slots + plan.landmark_slots; i += kAllWarps) {
            barrier_init(&barriers.block_full[i], 1);
            barrier_init(&barriers.block_empty[i],
                         kWarps * (i < plan.key_slots ? plan.tiles : Traits::kWarpgroups));
        }
        barrier_init_fence();
    }

    __device__ void prefetch_maps() const {
        for (const CUtensorMap* map : {&maps.query, &maps.key, &maps.value, &maps.output}) prefetch_map(*map);
        if (!plan.has_landmarks) return;
        for (const CUtensorMap* map : {&maps.landmark_key, &maps.landmark_value}) prefetch_map(*map);
    }

    __device__ void load_tile(S* to, const CUtensorMap& map, uint64_t* full, int x, int y,
                              const WindowCursor& at) const {
#pragma unroll
        for (int panel = 0; panel < Traits::kPanels; ++panel)
            load_box(to + panel * Traits::kPanelElements, map, full, 64 * panel, x, y, at.head, at.batch);
    }
    __device__ void load_block(int slot, uint32_t phase, int rows, const CUtensorMap& key_map,
                               const CUtensorMap& value_map, int x, int y, const WindowCursor& at) const {
        barrier_wait(&barriers.block_empty[slot], phase ^ 1);
        uint64_t* full = &barriers.block_full[slot];
        barrier_arrive_expect(full, 2 * rows * kHeadDim * static_cast<int>(sizeof(S)));
        load_tile(blocks + slot * 2 * kTile, key_map, full, x, y, at);
        load_tile(blocks + slot * 2 * kTile + kTile, value_map, full, x, y, at);
    }

    // By one thread each.
    __device__ void load_queries() const {
        const Windows& w = plan.windows;
        RingCursor query, key;
        int sequence = -1;
#pragma unroll 1
        for (WindowCursor at = begin; at.left > 0; at.advance(plan)) {
            sequence += at.enters_sequence;
#pragma unroll 1
            for (int tile = 0; tile < plan.tiles; ++tile) {
                barrier_wait(&barriers.query_empty[query.slot], query.phase ^ 1);
                barriers.place[query.slot] = {at.head, at.batch, at.row, at.column, tile, sequence};
                uint64_t* full = &barriers.query_full[query.slot];
                const int x = at.column * w.queries.width + kBlockM * tile, y = at.row * w.queries.height;
                const int bytes = plan.tile_tokens * kHeadDim * static_cast<int>(sizeof(S));
                if constexpr (kIsOneTile) { // side by side in memory
                    barrier_wait(&barriers.block_empty[key.slot], key.phase ^ 1);
                    barrier_arrive_expect(full, 3 * bytes);
                    S* block = blocks + key.slot * 2 * kTile;
                    load_tile(block, maps.key, full, x, y, at);
                    load_tile(block + kTile, maps.value, full, x, y, at);
                    key.advance(plan.key_slots);
                } else {
                    barrier_arrive_expect(full, bytes);
                }
                load_tile(queries + query.slot * kTile, maps.query, full, x, y, at);
                query.advance(Traits::kQuerySlots);
            }
        }
    }
    __device__ void load_keys() const {
        const Windows& w = plan.windows;
        RingCursor key;
#pragma unroll 1
        for (WindowCursor at = begin; at.left > 0; at.advance(plan))
#pragma unroll 1
            for (int block = 0; block < plan.tiles; ++block) {
                load_block(key.slot, key.phase, plan.tile_tokens, maps.key, maps.value,
                           at.column * w.queries.width + kBlockN * block, at.row * w.queries.height, at);
                key.advance(plan.key_slots);
            }
    }
    __device__ void load_landmarks() const {
        RingCursor landmark;
#pragma unroll 1
        for (WindowCursor at = begin; at.left > 0; at.advance(plan)) {
            if (at.enters_sequence) {
                load_block(plan.key_slots + landmark.slot, landmark.phase, kBlockN, maps.landmark_key,
                           maps.landmark_value, 0, 0, at);
                landmark.advance(plan.landmark_slots);
            }
        }
    }
    __device__ void store() const {
        const Windows& w = plan.windows;
        RingCursor query;
#pragma unroll 1
        for (int left = tiles_in_share(); left > 0; --left) {
            barrier_wait(&barriers.output_full[query.slot], query.phase);
            const typename Traits::Place at = barriers.place[query.slot];
#pragma unroll
            for (int panel = 0; panel < Traits::kPanels; ++panel)
                store_box(queries + query.slot * kTile + panel * Traits::kPanelElements, maps.output,
                          64 * panel, at.column * w.queries.width + kBlockM * at.tile,
                          at.row * w.queries.height, at.head, at.batch);
            store_commit();
            store_wait_read();
            barrier_arrive(&barriers.query_empty[query.slot]);
            query.advance(Traits::kQuerySlots);
        }
    }

    // A tile of queries and the columns that some of them see: blocks of the window, then the landmarks.
    struct Unit {
        const typename Traits::Place& place; // of the window
        int tile, window_blocks;
        int visible; // keys from the window's first on that the grid has; of one tile 0 if it lacks some
        bool sees_landmarks;
        S* queries; // then the output
    };

    // Blocks of the window from `first` on, at which `key` stands, and then the landmarks.
    template <int kWindowBlocks, bool kHasLandmarks>
    __device__ void attend_blocks(OnlineSoftmax<kHeadDim>& softmax, const Unit& unit, int first,
                                  RingCursor& key, const RingCursor& landmark) const {
        constexpr int kBlocks = kWindowBlocks + kHasLandmarks;
        float score[kBlocks * kColumns / 8][4];
        const auto block_score = [&](int i) -> ScoreTile& {
            return reinterpret_cast<ScoreTile&>(score[i * kColumns / 8]);
        };
        int slot[kBlocks];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            const bool of_window = i < kWindowBlocks;
            slot[i] = of_window ? key.slot : plan.key_slots + landmark.slot;
            if (kHasBias && of_window) begin_scores(block_score(i), unit.tile, first + i);
            if (!kIsOneTile || !of_window)
                barrier_wait(&barriers.block_full[slot[i]], of_window ? key.phase : landmark.phase);
            if (of_window) key.advance(plan.key_slots);
        }

        const uint64_t from_query = tile_descriptor(unit.queries);
        warpgroup_fence();
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            const uint64_t from_key = tile_descriptor(blocks + slot[i] * 2 * kTile);
#pragma unroll
            for (int d = 0; d < kHeadDim / 16; ++d) {
                const int offset = d / 4 * (Traits::kPanelElements / 8) + d % 4 * 2;
                warpgroup_multiply<S, 0, 0>(block_score(i), from_query + offset, from_key + offset,
                                            (kHasBias && i < kWindowBlocks) || d > 0);
            }
            warpgroup_commit();
        }

        // Products with later blocks go on during the softmax over one.
        float largest[2] = {-kInfinity, -kInfinity};
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            i + 2 < kBlocks   ? warpgroup_wait<2>()
            : i + 1 < kBlocks ? warpgroup_wait<1>()
                              : warpgroup_wait<0>();
            fence_registers(block_score(i));
            if (i == kWindowBlocks) {
                hide_landmarks(block_score(i), unit);
            } else if (unit.visible < kBlockN * (first + i + 1)) {
                hide_outside(block_score(i), unit, first + i);
            }
            softmax.find_largest(largest, block_score(i));
            asm volatile("" : "+f"(largest[0]), "+f"(largest[1]));
        }
        const float scale = static_cast<float>(p.scale) * kLog2e;
        const auto step = kIsOneTile ? softmax.begin_step(largest, scale)
                                     : softmax.begin_rare_step(largest, scale, first > 0);

        using Output = float[8][4];
        const auto panel_output = [&](int panel) -> Output& {
            return reinterpret_cast<Output&>(softmax.output[8 * panel]);
        };
        uint32_t weight[kBlocks][kBlockN / 16][4];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            softmax.weigh(block_score(i), scale, step);
#pragma unroll
            for (int k = 0; k < kBlockN / 16; ++k)
                softmax.template pack_weights<S>(weight[i][k], block_score(i), k);
            warpgroup_fence();
            const uint64_t from_value = tile_descriptor(blocks + (slot[i] * 2 + 1) * kTile);
#pragma unroll
            for (int k = 0; k < kBlockN / 16; ++k)
#pragma unroll
                for (int panel = 0; panel < Traits::kPanels; ++panel)
                    warpgroup_multiply<S, 1>(panel_output(panel), weight[i][k],
                                             from_value + panel * (Traits::kPanelElements / 8) + k * 128,
                                             !kIsOneTile || i > 0 || k > 0);
            warpgroup_commit();
        }
        warpgroup_wait();
#pragma unroll
        for (int panel = 0; panel < Traits::kPanels; ++panel) fence_registers(panel_output(panel));
#pragma unroll
        for (int i = 0; i < kWindowBlocks; ++i) release(&barriers.block_empty[slot[i]]);
    }

    // By the warpgroups, which take turns at the tiles.
    __device__ void attend() const {
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroupSize, 0);
        clear_padding();

        int head = begin.head, batch = begin.batch;
        int sequence = 0, tile = 0;
        RingCursor query, key, landmark;
        fill_bias(head);
        const auto advance = [&](int by) {
            query.advance(Traits::kQuerySlots, by);
            if constexpr (kIsOneTile) {
                key.advance(plan.key_slots, by);
            } else {
                for (tile += by; tile >= plan.tiles; tile -= plan.tiles)
                    key.advance(plan.key_slots, plan.tiles);
            }
        };
        advance(warpgroup);
        // Through every sequence, those without a tile of this warpgroup too: all warpgroups release each
        // landmarks and meet at each head's biases, in one order, so that none waits for one that waits for
        // it.
        const auto go_to_sequence = [&](int to) {
#pragma unroll 1
            for (; sequence < to; ++sequence) {
                if (plan.has_landmarks) {
                    const int slot = plan.key_slots + landmark.slot;
                    barrier_wait(&barriers.block_full[slot], landmark.phase);
                    release(&barriers.block_empty[slot]);
                    landmark.advance(plan.landmark_slots);
                }
                if (++batch < plan.batch) continue;
                batch = 0;
                fill_bias(++head);
            }
        };
#pragma unroll 1
        for (int left = tiles_in_share() - warpgroup; left > 0;
             left -= Traits::kWarpgroups, advance(Traits::kWarpgroups)) {
            barrier_wait(&barriers.query_full[query.slot], query.phase);
            const typename Traits::Place& at = barriers.place[query.slot];
            go_to_sequence(at.sequence);

            const Unit unit = unit_of(at, tile, queries + query.slot * kTile);
            OnlineSoftmax<kHeadDim> softmax;
            RingCursor unit_key = key;
            int block = 0;
            if constexpr (!kIsOneTile) {
#pragma unroll 1
                for (; block + 1 + unit.sees_landmarks < unit.window_blocks; block += 2)
                    attend_blocks<2, false>(softmax, unit, block, unit_key, landmark);
            }
            if (!kIsOneTile && unit.sees_landmarks && block + 2 == unit.window_blocks) {
                attend_blocks<2, true>(softmax, unit, block, unit_key, landmark);
            } else if (unit.sees_landmarks) {
                attend_blocks<1, true>(softmax, unit, block, unit_key, landmark);
            } else if (block < unit.window_blocks) {
                attend_blocks<1, false>(softmax, unit, block, unit_key, landmark);
            }
#pragma unroll 1
            for (int hidden = unit.window_blocks; hidden < plan.tiles; ++hidden) {
                barrier_wait(&barriers.block_full[unit_key.slot], unit_key.phase);
                release(&barriers.block_empty[unit_key.slot]);
                unit_key.advance(plan.key_slots);
            }
            warpgroup_sync(warpgroup);
            put_output(softmax, unit, &barriers.output_full[query.slot]);
        }
        go_to_sequence(last_sequence());
        if (plan.has_landmarks) // no copy may outlive the CTA
            barrier_wait(&barriers.block_full[plan.key_slots + landmark.slot], landmark.phase);
    }

  private:
    __device__ bool is_causal() const { return kHasBias && p.shape.geometry.is_causal; }

    __device__ static void consumers_sync() { sync_threads(8, Traits::kConsumers); }

    // Of the CTA's, by number.
    __device__ int last_sequence() const {
        int last = -1;
        for (int i = 0; i < begin.left; ++last)
            i = plan.shares.next_sequence(i, plan.shares.begin(blockIdx.x), plan.windows.num_windows);
        return last;
    }
    __device__ int tiles_in_share() const { return begin.left * plan.tiles; }

    __device__ TokenBox box_of(const typename Traits::Place& place) const {
        return plan.windows.query_box(place.row, place.column);
    }
    __device__ Unit unit_of(const typename Traits::Place& place, int tile, S* queries) const {
        const TokenBox box = box_of(place);
        const int window_blocks = is_causal() ? tile + 1 : plan.tiles;
        const int landmarks = landmarks_before(box.x0 + kBlockM * (tile + 1) - 1);
        const int visible = !kIsOneTile ? plan.windows.grid_width - box.x0 : box.is_whole() ? kBlockN : 0;
        return Unit{place, tile, window_blocks, visible, landmarks > 0, queries};
    }

    __device__ void put_output(OnlineSoftmax<kHeadDim>& softmax, const Unit& unit,
                               uint64_t* output_full) const {
        const typename Traits::Place at = unit.place;
        const TokenBox box = box_of(at);
        const int lane = threadIdx.x % kWarpSize;
        const int first_row = score_row();
        float logsumexp[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) logsumexp[r] = softmax.finish_row(r, 1.0f);
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; d += 2) {
            const Tile<S, 64> panel{unit.queries + d / 8 * Traits::kPanelElements};
            uint32_t packed[4];
            softmax.template pack_weights<S>(packed, softmax.output, d / 2);
            store_matrix(shared_address(panel.unit(first_row - lane / 4 + lane % 16, d % 8 + lane / 16)),
                         packed);
        }
        fence_async_proxy();
        release(output_full);

        const int64_t sequence = static_cast<int64_t>(at.batch) * p.shape.heads + at.head;
        auto* to = static_cast<float*>(p.logsumexp) + sequence * plan.windows.num_tokens;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int place = kBlockM * unit.tile + first_row + 8 * r;
            const int token = kIsOneTile             ? box.token(place)
                              : place < unit.visible ? box.y0 * plan.windows.grid_width + box.x0 + place
                                                     : -1;
            if (lane % 4 == 0 && token >= 0) to[token] = logsumexp[r];
        }
    }

    // Zeros in the rows of blocks that no box of tokens reaches: weights there are 0.
    __device__ void clear_padding() const {
        const int first = plan.tile_tokens * 8, units = kTile / Traits::kPanels / 8 - first;
        if (units == 0) return;
        for (int panel = 0; panel < plan.key_slots * 2 * Traits::kPanels; ++panel)
            for (int i = threadIdx.x; i < units; i += Traits::kConsumers)
                reinterpret_cast<uint4*>(blocks + panel * Traits::kPanelElements)[first + i] =
                    uint4{0, 0, 0, 0};
        fence_async_proxy();
    }

    // Of a head, divided by the scale: scores begin with them.
    __device__ void fill_bias(int head) const {
        const Windows& w = plan.windows;
        if (!kHasBias || (!w.has_table && !kIsOneTile)) return;
        if (!kIsOneTile) consumers_sync();
        fill_bias_table<Traits::kConsumers>(p, w, head, bias_table, 1.0f / static_cast<float>(p.scale));
        consumers_sync();
        if (!kIsOneTile) return;
        fill_bias_tile<Traits::kWarpgroups, false, kColumns / 8>(w, bias_table, bias_tile);
        consumers_sync();
    }

    // Of a block of the window.
    __device__ void begin_scores(ScoreTile& score, int tile, int block) const {
        if constexpr (kIsOneTile) {
            begin_with_bias(score, bias_tile);
            return;
        }
        const bool has_bias = p.relative_bias || (is_causal() && block == tile);
        const float* bias =
            bias_table + plan.windows.center + kBlockN * (block - tile) + score_column() - score_row();
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[n][i] = has_bias ? bias[8 * n + i % 2 - i / 2 * 8] : 0.0f;
    }

    __device__ int landmarks_before(int token) const {
        const int landmarks = static_cast<int>(p.num_landmarks);
        const Geometry& g = p.shape.geometry;
        return is_causal() ? min(landmarks, token / static_cast<int>(g.chunk_width)) : landmarks;
    }

    __device__ void hide_outside(ScoreTile& score, const Unit& unit, int block) const {
        if constexpr (kIsOneTile) {
            mma::hide_outside(score, box_of(unit.place), block);
        } else {
            const uint32_t hidden = columns_from(max(0, unit.visible - kBlockN * block));
            hide(score, {hidden, hidden});
        }
    }
    __device__ void hide_landmarks(ScoreTile& score, const Unit& unit) const {
        uint32_t hidden[2];
        if (!is_causal()) {
            auto landmarks = static_cast<int>(p.num_landmarks);
            asm volatile("" : "+r"(landmarks)); // bits are found again, not kept in registers
            hidden[0] = hidden[1] = columns_from(landmarks);
        } else {
            const int first =
                unit.place.column * plan.windows.queries.width + kBlockM * unit.tile + score_row();
#pragma unroll
            for (int r = 0; r < 2; ++r) hidden[r] = columns_from(landmarks_before(first + 8 * r));
        }
        hide(score, hidden);
    }
};

// Compiled for Hopper alone, as the launch bounds tell.
template <class S, int kHeadDim, int kOnlyColumns, bool kHasBias>
__global__ void
__launch_bounds__(kHasWarpgroups ? AttentionSm90Traits<S, kHeadDim, kOnlyColumns>::kThreads : kWarpSize, 1)
    window_attention_fwd_sm90_kernel(const __grid_constant__ AttentionParams p,
                                     const __grid_constant__ AttentionSm90Plan plan,
                                     const __grid_constant__ AttentionSm90Maps maps) {
    if constexpr (kHasWarpgroups) {
        using Traits = AttentionSm90Traits<S, kHeadDim, kOnlyColumns>;
        extern __shared__ __align__(1024) char attention_tiles[];
        const int role = threadIdx.x / kWarpSize - Traits::kConsumers / kWarpSize;
        const AttentionSm90<S, kHeadDim, kOnlyColumns, kHasBias> attention(p, plan, maps, attention_tiles);
        if (threadIdx.x % kWarpSize == 0) attention.init_barriers();
        if (threadIdx.x == Traits::kConsumers) attention.prefetch_maps();
        wait_for_dependencies();
        __syncthreads();
        if (role < 0) {
            warpgroup_take_registers<Traits::kConsumerRegisters>();
            attention.attend();
        } else {
            warpgroup_give_registers<Traits::kServiceRegisters>();
            if (threadIdx.x % kWarpSize != 0) return;
            if (role == 0) attention.load_queries();
            if (role == 1 && !Traits::kIsOneTile) attention.load_keys();
            if (role == 2 && plan.has_landmarks) attention.load_landmarks();
            if (role == 3) attention.store();
        }
    }
}

// False where this kernel was not compiled for the device, or does not do what is asked.
template <class S, int kHeadDim, int kOnlyColumns, bool kHasBias>
bool launch_window_attention_fwd_sm90(const AttentionParams& p, Windows w, cudaStream_t stream) {
    using Traits = AttentionSm90Traits<S, kHeadDim, kOnlyColumns>;
    using Attention = AttentionSm90<S, kHeadDim, kOnlyColumns, kHasBias>;
    constexpr bool kIsOneTile = Traits::kIsOneTile;
    const Geometry& g = p.shape.geometry;
    const auto kernel = window_attention_fwd_sm90_kernel<S, kHeadDim, kOnlyColumns, kHasBias>;
    if (!kIsOneTile) w.table_size = w.table_height * w.table_width; // no place is hidden
    const int64_t num_windows = p.shape.batch * p.shape.heads * w.num_windows;
    if (num_windows == 0) return true;
    if (num_windows > INT_MAX) return false;
    AttentionSm90Plan plan{
        .windows = w,
        .batch = static_cast<int>(p.shape.batch),
        .rows = static_cast<int>(g.window_rows()),
        .shares = WindowShares::of(p.shape, g.window_rows(), g.window_columns()),
        .tiles = kIsOneTile ? 1 : w.queries.width / kBlockM,
        .tile_tokens = std::min(w.queries.size(), kBlockM),
        .has_landmarks = p.num_landmarks > 0,
        .key_slots = 0,
        .landmark_slots = p.num_landmarks > 0 ? Traits::kMaxLandmarkSlots : 0,
    };
    // So many that each warpgroup meets every phase of the slots whose barriers it waits for.
    const bool meets_all_windows = kIsOneTile || plan.tiles >= Traits::kWarpgroups;
    const int min_slots = plan.tiles * (kIsOneTile || !meets_all_windows ? Traits::kWarpgroups : 1);
    const int step = meets_all_windows ? 1 : min_slots;
    const int good_slots = kIsOneTile ? min_slots + min_slots / 2 : 2 * min_slots;
    plan.key_slots = Traits::kMaxKeySlots / step * step;

    static LimitsOf limits_of;
    const KernelLimits& limits = limits_of(kernel);
    if (limits.threads < Traits::kThreads) return false;
    while (Attention::shared_bytes(plan) > limits.shared_bytes) {
        if (plan.key_slots > good_slots || (plan.landmark_slots <= 1 && plan.key_slots > min_slots)) {
            plan.key_slots -= step;
        } else if (plan.landmark_slots > 1) {
            --plan.landmark_slots;
        } else {
            return false;
        }
    }

    AttentionSm90Maps maps;
    const auto make_token_map = [&](CUtensorMap& map, const Rows& rows) {
        return make_map<S>(map, p.shape, rows, g.grid_height, g.grid_width, w.queries.height,
                           kIsOneTile ? w.queries.width : kBlockM);
    };
    if (!make_token_map(maps.query, p.query) || !make_token_map(maps.key, p.key) ||
        !make_token_map(maps.value, p.value) || !make_token_map(maps.output, p.output) ||
        !make_landmark_map<S>(maps.landmark_key, p, p.landmark_key, kBlockN) ||
        !make_landmark_map<S>(maps.landmark_value, p, p.landmark_value, kBlockN))
        return false;

    const auto bytes = static_cast<int>(Attention::shared_bytes(plan));
    launch_dependent(kernel, plan.shares.ctas(), Traits::kThreads, bytes, stream, p, plan, maps);
    return true;
}

template <class S, int kHeadDim>
bool launch_window_attention_fwd_sm90(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    const Windows w = Windows::of(p);
    if (p.dropout.threshold > 0 || p.key_padding_mask || p.landmark_bias || p.extents ||
        g.num_prefix_tokens > 0 || g.windows_overlap() || p.num_landmarks > kBlockN)
        return false;
    if constexpr (kHeadDim == 64)
        if (std::max<int64_t>(w.queries.size(), p.num_landmarks) <= 56) // as of 7 x 7
            return launch_window_attention_fwd_sm90<S, kHeadDim, 56, true>(p, w, stream);
    if (w.queries.size() <= kBlockM)
        return launch_window_attention_fwd_sm90<S, kHeadDim, kBlockN, true>(p, w, stream);
    const bool has_whole_tiles = w.queries.height == 1 && w.queries.width % kBlockM == 0 &&
                                 w.queries.width <= kBlockM * AttentionSm90Traits<S, kHeadDim, 0>::kMaxTiles;
    if (!has_whole_tiles) return false;
    if constexpr (kHeadDim == 64)
        if (!w.has_table) return launch_window_attention_fwd_sm90<S, kHeadDim, 0, false>(p, w, stream);
    return launch_window_attention_fwd_sm90<S, kHeadDim, 0, true>(p, w, stream);
}

} // namespace eva_attn::cuda::mma
