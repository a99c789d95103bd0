// Last kernel of the joint attention's backward with Hopper's asynchronous copies and products: for windows
// of a grid or of a sequence, of at most 64 tokens, without overlap, for up to 64 landmarks, and none of the
// options but the relative bias. A warpgroup takes a window as one tile.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "kernels/cuda/device.h"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/product.cuh"
#include "kernels/cuda/mma/window_tile.cuh"
#include "kernels/cuda/tma.cuh"

namespace eva_attn::cuda::mma {

template <class S_>
struct TileGradSm90Traits {
    using S = S_;
    static constexpr int kTile = 64; // tokens of a window, landmarks, columns of their rows
    static constexpr int kTileElements = kTile * kTile;
    // Warpgroups that compute; of one more, a warp loads, a warp stores, and a warp clears.
    static constexpr int kWarpgroups = 2;
    static constexpr int kConsumers = kWarpgroups * kWarpgroupSize;
    static constexpr int kThreads = kConsumers + kWarpgroupSize;
    static constexpr int kConsumerRegisters = 232, kServiceRegisters = 40;
    static constexpr int kSlots = 2 * kWarpgroups, kLandmarkSlots = 2;
    static constexpr int kTerms = 4, kMostChunks = 16; // rows that a chunk adds to its tokens' gradients
    static constexpr int kMaxTableSize = 384;          // (2 h - 1) (2 w - 1) + (h - 1) (2 w - 1) + w

    struct Window { // gradients replace the rows on their way out
        alignas(1024) S query[kTileElements];
        alignas(1024) S key[kTileElements];
        alignas(1024) S value[kTileElements]; // then the weights [query, key]
        alignas(1024) S grad_output[kTileElements];
        // What the tokens get as members of chunks: omega, grad_beta, grad_key_mean, grad_query_mean.
        alignas(1024) S terms[kTerms][kMostChunks * kTile];
    };
    struct Landmarks {
        alignas(1024) S key[kTileElements];
        alignas(1024) S value[kTileElements];
    };
    struct Shared {
        Window windows[kSlots];
        Landmarks landmarks[kLandmarkSlots];
        alignas(1024) S grad_score[kWarpgroups][kTileElements]; // [query, key]
        union {
            struct {
                float4 bias_tile[kScoreTileVectors];
                float bias_table[kMaxTableSize];
            };
            float bias_sum[kTile][kTile + 1]; // [key, query]
        };
        alignas(128) S padding[kTile]; // rows beyond the window's go here, so that they stay zeros elsewhere
        uint64_t window_full[kSlots], gradients_full[kSlots], window_empty[kSlots];
        uint64_t landmarks_full[kLandmarkSlots], landmarks_empty[kLandmarkSlots];
    };
};

struct TileGradSm90Plan {
    Windows windows;
    int batch, rows;
    int64_t num_windows; // of all sequences
    bool has_landmarks, has_terms;
    int chunks_height, chunks_width; // a box that holds the chunks of any window
    int chunk_height, chunk_width;
    uint32_t chunk_height_reciprocal, chunk_width_reciprocal;

    __host__ __device__ int64_t windows_of_head() const { return int64_t{batch} * windows.num_windows; }
    // Whose share the window is in.
    __host__ __device__ int cta_of(int64_t window, int64_t ctas) const {
        return static_cast<int>(((window + 1) * ctas + num_windows - 1) / num_windows - 1);
    }
};

struct TileGradSm90Maps {
    CUtensorMap query, key, value, grad_output, landmark_key, landmark_value, terms[4];
    CUtensorMap grad_query, grad_key, grad_value;
};

template <class Traits>
struct TileGradSm90 {
    using S = typename Traits::S;
    using Window = typename Traits::Window;
    using Landmarks = typename Traits::Landmarks;
    static constexpr int kTile = Traits::kTile;

    const AttentionParams& p;
    const TileGradSm90Plan& plan;
    const TileGradSm90Maps& maps;
    typename Traits::Shared& shared;

    // Rows of tiles that no copy reaches; by all threads.
    __device__ void clear_padding() const {
        const auto clear = [](S* tile, int first, int rows) {
            for (int i = first * 8 + threadIdx.x; i < rows * 8; i += Traits::kThreads)
                reinterpret_cast<uint4*>(tile)[i] = uint4{0, 0, 0, 0};
        };
        const int size = plan.windows.queries.size();
        for (Window& window : shared.windows) {
            for (S* tile : {window.query, window.key, window.value, window.grad_output})
                clear(tile, size, kTile);
            for (S* tile : window.terms)
                clear(tile, plan.has_terms ? plan.chunks_height * plan.chunks_width : 0, Traits::kMostChunks);
        }
        for (S* tile : shared.grad_score) clear(tile, size, kTile);
        for (Landmarks& landmarks : shared.landmarks)
            for (S* tile : {landmarks.key, landmarks.value})
                clear(tile, plan.has_landmarks ? kTile : 0, kTile);
        fence_async_proxy();
    }

    __device__ void init_barriers() const {
        constexpr int kWarps = kWarpgroupSize / kWarpSize;
        for (int i = 0; i < Traits::kSlots; ++i) {
            barrier_init(&shared.window_full[i], 1);
            barrier_init(&shared.gradients_full[i], kWarps);
            barrier_init(&shared.window_empty[i], 1);
        }
        for (int i = 0; i < Traits::kLandmarkSlots; ++i) {
            barrier_init(&shared.landmarks_full[i], 1);
            barrier_init(&shared.landmarks_empty[i], Traits::kWarpgroups * kWarps);
        }
        barrier_init_fence();
    }

    // By one thread.
    __device__ void load() const {
        constexpr int kRowBytes = kTile * static_cast<int>(sizeof(S));
        const Windows& w = plan.windows;
        RingCursor slot, landmark_slot;
        bool is_first = true;
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            const int y0 = at.row * w.queries.height, x0 = at.column * w.queries.width;
            const int chunk_y = y0 / plan.chunk_height, chunk_x = x0 / plan.chunk_width;
            Window& window = shared.windows[slot.slot];
            uint64_t* const full = &shared.window_full[slot.slot];
            barrier_wait(&shared.window_empty[slot.slot], slot.phase ^ 1);
            const int chunks = plan.has_terms ? plan.chunks_height * plan.chunks_width : 0;
            barrier_arrive_expect(full, (4 * w.queries.size() + Traits::kTerms * chunks) * kRowBytes);
            load_box(window.query, maps.query, full, 0, x0, y0, at.head, at.batch);
            load_box(window.key, maps.key, full, 0, x0, y0, at.head, at.batch);
            load_box(window.grad_output, maps.grad_output, full, 0, x0, y0, at.head, at.batch);
            load_box(window.value, maps.value, full, 0, x0, y0, at.head, at.batch);
            if (plan.has_terms) {
#pragma unroll
                for (int i = 0; i < Traits::kTerms; ++i)
                    load_box(window.terms[i], maps.terms[i], full, 0, chunk_x, chunk_y, at.head, at.batch);
            }
            slot.advance(Traits::kSlots);
            if (plan.has_landmarks && (is_first || at.begins_sequence())) {
                Landmarks& landmarks = shared.landmarks[landmark_slot.slot];
                uint64_t* const landmarks_full = &shared.landmarks_full[landmark_slot.slot];
                barrier_wait(&shared.landmarks_empty[landmark_slot.slot], landmark_slot.phase ^ 1);
                barrier_arrive_expect(landmarks_full, 2 * kTile * kRowBytes);
                load_box(landmarks.key, maps.landmark_key, landmarks_full, 0, 0, 0, at.head, at.batch);
                load_box(landmarks.value, maps.landmark_value, landmarks_full, 0, 0, 0, at.head, at.batch);
                landmark_slot.advance(Traits::kLandmarkSlots);
            }
            is_first = false;
        }
    }

    // By one thread.
    __device__ void store() const {
        const Windows& w = plan.windows;
        RingCursor slot;
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            const int y0 = at.row * w.queries.height, x0 = at.column * w.queries.width;
            const Window& window = shared.windows[slot.slot];
            barrier_wait(&shared.gradients_full[slot.slot], slot.phase);
            store_box(window.query, maps.grad_query, 0, x0, y0, at.head, at.batch);
            store_box(window.key, maps.grad_key, 0, x0, y0, at.head, at.batch);
            store_box(window.value, maps.grad_value, 0, x0, y0, at.head, at.batch);
            store_commit();
            store_wait_read();
            barrier_arrive(&shared.window_empty[slot.slot]);
            slot.advance(Traits::kSlots);
        }
    }

    // Zeros in those pieces of the bias gradient that no CTA writes; by one warp.
    __device__ void clear_bias_pieces() const {
        if (!p.grad_relative_bias) return;
        const int64_t pieces = plan.batch * p.bias_pieces;
        const int entries = bias_entries();
#pragma unroll 1
        for (int64_t i = blockIdx.x; i < p.shape.heads * pieces; i += gridDim.x) {
            const int64_t head = i / pieces, first = head * plan.windows_of_head();
            const int last_cta = plan.cta_of(first + plan.windows_of_head() - 1, gridDim.x);
            if (i - head * pieces <= last_cta - plan.cta_of(first, gridDim.x)) continue;
            float* const to = bias_piece(head, i - head * pieces);
            for (int j = threadIdx.x % kWarpSize; j < entries; j += kWarpSize) to[j] = 0;
        }
    }

    // By the warpgroups, which take turns at the windows.
    __device__ void compute() const {
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroupSize, 0);
        ScoreTile grad_bias = {}; // summed over windows
        int head = -1, turn = 0;
        RingCursor slot, landmark_slot;
        WindowCursor ahead = WindowCursor::first(plan); // at the warpgroup's next window
        for (int i = 0; i < warpgroup; ++i) ahead.advance(plan);
        Numbers next = load_numbers(ahead);
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            if (at.head != head) {
                if (head >= 0) store_bias(head, warpgroup, grad_bias);
                fill_bias(at.head);
            }
            head = at.head;
            if (turn == warpgroup) {
                const Numbers numbers = next;
                for (int i = 0; i < Traits::kWarpgroups; ++i) ahead.advance(plan);
                next = load_numbers(ahead);
                const TokenBox box = plan.windows.query_box(at.row, at.column);
                const int2 in_chunk{box.y0 % plan.chunk_height, box.x0 % plan.chunk_width};
                barrier_wait(&shared.window_full[slot.slot], slot.phase);
                if (plan.has_landmarks)
                    barrier_wait(&shared.landmarks_full[landmark_slot.slot], landmark_slot.phase);
                find_gradients(shared.windows[slot.slot], shared.landmarks[landmark_slot.slot], in_chunk, box,
                               numbers, warpgroup, grad_bias);
                release(&shared.gradients_full[slot.slot]);
            }
            slot.advance(Traits::kSlots);
            if (++turn == Traits::kWarpgroups) turn = 0;
            if (plan.has_landmarks && at.row == plan.rows - 1 && at.column == plan.windows.columns - 1) {
                barrier_wait(&shared.landmarks_full[landmark_slot.slot], landmark_slot.phase);
                release(&shared.landmarks_empty[landmark_slot.slot]);
                landmark_slot.advance(Traits::kLandmarkSlots);
            }
        }
        store_bias(head, warpgroup, grad_bias);
    }

  private:
    using Factor = uint32_t[4]; // the first one [64, 16] of a product
    using Operand = Factor[kTile / 16];

    // Of the thread's two rows.
    struct Numbers {
        float logsumexp[2], delta[2], chunk_weight[2], chunk_grad[2];
    };
    __device__ Numbers load_numbers(const WindowCursor& at) const {
        const TokenBox box = plan.windows.query_box(at.row, at.column);
        const int64_t sequence = static_cast<int64_t>(at.batch) * p.shape.heads + at.head;
        Numbers numbers;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int token = at.left > 0 ? box.token(score_row() + 8 * r) : -1;
            const int64_t from = sequence * plan.windows.num_tokens + token;
            const auto load = [&](const void* data, bool exists, float otherwise) {
                return exists && token >= 0 ? static_cast<const float*>(data)[from] : otherwise;
            };
            numbers.logsumexp[r] = load(p.logsumexp, true, kInfinity);
            numbers.delta[r] = load(p.delta, true, 0.0f);
            numbers.chunk_weight[r] = load(p.chunk_terms.token_weight, plan.has_terms, 0.0f);
            numbers.chunk_grad[r] = load(p.chunk_terms.token_grad, plan.has_terms, 0.0f);
        }
        return numbers;
    }

    __device__ void find_gradients(Window& window, const Landmarks& landmarks, const int2& in_chunk,
                                   const TokenBox& box, const Numbers& numbers, int warpgroup,
                                   ScoreTile& grad_bias) const {
        const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
        const uint64_t query = tile_descriptor(window.query), key = tile_descriptor(window.key),
                       value = tile_descriptor(window.value),
                       grad_output = tile_descriptor(window.grad_output),
                       landmark_key = tile_descriptor(landmarks.key),
                       landmark_value = tile_descriptor(landmarks.value);
        ScoreTile score, grad_weight, landmark_score, landmark_grad_weight;
        begin_with_bias(score, shared.bias_tile);
        warpgroup_fence();
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            warpgroup_multiply<S, 0, 0>(score, query + 2 * d, key + 2 * d, 1);
            warpgroup_multiply<S, 0, 0>(grad_weight, grad_output + 2 * d, value + 2 * d, d > 0);
        }
        warpgroup_commit();
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            warpgroup_multiply<S, 0, 0>(landmark_score, query + 2 * d, landmark_key + 2 * d, d > 0);
            warpgroup_multiply<S, 0, 0>(landmark_grad_weight, grad_output + 2 * d, landmark_value + 2 * d,
                                        d > 0);
        }
        warpgroup_commit();

        float lse[2], delta[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            lse[r] = numbers.logsumexp[r] * kLog2e;
            delta[r] = numbers.delta[r] * scale;
        }
        // To weights, and to the gradients of the scores times the scale.
        const auto weigh = [&](ScoreTile& score, ScoreTile& grad_weight, int n, int columns) {
            if (n == kTile / 8 - 1 && columns <= 8 * n) { // as of 7 x 7
#pragma unroll
                for (int e = 0; e < 4; ++e) score[n][e] = grad_weight[n][e] = 0;
                return;
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                score[n][e] = exp2_approx(score[n][e] * scale_log2 - lse[e / 2]);
                grad_weight[n][e] = score[n][e] * (grad_weight[n][e] * scale - delta[e / 2]);
            }
        };
        warpgroup_wait<1>();
        fence_registers(score);
        fence_registers(grad_weight);
        warpgroup_sync(warpgroup); // all are done with the values
        if (!box.is_whole()) hide_outside(score, box, 0);
        Operand weight, grad_score;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
            weigh(score, grad_weight, n, plan.windows.queries.size());
#pragma unroll
            for (int e = 0; e < 4; ++e) grad_bias[n][e] += grad_weight[n][e];
        }
        pack_tile(weight, score);
        pack_tile(grad_score, grad_weight);
        put(weight, window.value);
        put(grad_score, shared.grad_score[warpgroup]);
        fence_async_proxy();
        warpgroup_sync(warpgroup);

        const uint64_t grad_scores = tile_descriptor(shared.grad_score[warpgroup]);
        Factor key_factor, value_factor, mean_factor, diagonal[4];
        find_factors(key_factor, value_factor, mean_factor, diagonal, in_chunk, numbers);
        ScoreTile grad_query, grad_key, grad_value;
        warpgroup_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            warpgroup_multiply<S, 1, 1>(grad_value, value + 128 * k, grad_output + 128 * k, k > 0);
            warpgroup_multiply<S, 1, 1>(grad_key, grad_scores + 128 * k, query + 128 * k, k > 0);
            warpgroup_multiply<S, 1>(grad_key, diagonal[k], key + 128 * k, 1);
        }
        warpgroup_multiply<S, 1>(grad_key, key_factor, tile_descriptor(window.terms[0]), 1);
        warpgroup_multiply<S, 1>(grad_value, value_factor, tile_descriptor(window.terms[1]), 1);
        warpgroup_multiply<S, 1>(grad_key, mean_factor, tile_descriptor(window.terms[2]), 1);
        warpgroup_commit();

        warpgroup_wait<1>();
        fence_registers(landmark_score);
        fence_registers(landmark_grad_weight);
        const uint32_t hidden = columns_from(static_cast<int>(p.num_landmarks));
        hide(landmark_score, {hidden, hidden});
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
            weigh(landmark_score, landmark_grad_weight, n, static_cast<int>(p.num_landmarks));
        Operand landmark_grad_score;
        pack_tile(landmark_grad_score, landmark_grad_weight);
        for (Factor& factor : landmark_grad_score) fence_factor(factor);
        warpgroup_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            warpgroup_multiply<S, 1>(grad_query, grad_score[k], key + 128 * k, k > 0);
            warpgroup_multiply<S, 1>(grad_query, landmark_grad_score[k], landmark_key + 128 * k, 1);
        }
        warpgroup_multiply<S, 1>(grad_query, mean_factor, tile_descriptor(window.terms[3]), 1);
        warpgroup_commit();

        Operand query_rows, key_rows, value_rows;
        warpgroup_wait<1>();
        fence_registers(grad_value);
        fence_registers(grad_key);
        pack_tile(value_rows, grad_value);
        pack_tile(key_rows, grad_key);
        warpgroup_wait();
        fence_registers(grad_query);
        pack_tile(query_rows, grad_query);
        warpgroup_sync(warpgroup); // all are done with the rows
        put(value_rows, window.value);
        put(key_rows, window.key);
        put(query_rows, window.query);
        fence_async_proxy();
    }

    // By which the terms of chunks are multiplied for keys, values and the means, and the keys themselves.
    __device__ void find_factors(Factor& key, Factor& value, Factor& mean, Factor (&diagonal)[4],
                                 const int2& in_chunk, const Numbers& numbers) const {
        const auto half = [](int column) { return column % 2 ? 0xffff0000u : 0xffffu; };
        const int warp = threadIdx.x % kWarpgroupSize / kWarpSize, group = threadIdx.x % kWarpSize / 4;
        const uint32_t on_diagonal = (group & ~1) == score_column() ? half(group) : 0;
        const uint32_t one = pack<S>(1, 1);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const BoxShape& shape = plan.windows.queries;
            const int row = score_row() + 8 * r, y = divide(row, shape.width_reciprocal);
            const int chunk = divide(in_chunk.x + y, plan.chunk_height_reciprocal) * plan.chunks_width +
                              divide(in_chunk.y + row - y * shape.width, plan.chunk_width_reciprocal);
            const uint32_t weight = pack<S>(numbers.chunk_weight[r], numbers.chunk_weight[r]),
                           grad = pack<S>(numbers.chunk_grad[r], numbers.chunk_grad[r]);
#pragma unroll
            for (int i = 0; i < 2; ++i) { // columns score_column() + 8 i and one further
                const uint32_t is_member = (chunk & ~1) == score_column() + 8 * i ? half(chunk) : 0;
                key[2 * i + r] = grad & is_member;
                value[2 * i + r] = weight & is_member;
                mean[2 * i + r] = one & is_member;
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    diagonal[k][2 * i + r] = i == r && k == warp ? (grad ^ 0x80008000u) & on_diagonal : 0;
            }
        }
        fence_factor(key), fence_factor(value), fence_factor(mean);
        for (Factor& factor : diagonal) fence_factor(factor);
    }
    // Keeps the compiler from computing it between products.
    __device__ static void fence_factor(Factor& factor) {
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(factor[i])::"memory");
    }

    __device__ static void pack_tile(Operand& to, const ScoreTile& x) {
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r) to[n / 2][n % 2 * 2 + r] = pack<S>(x[n][2 * r], x[n][2 * r + 1]);
    }
    // The rows of a window into a tile.
    __device__ void put(const Operand& x, S* tile) const {
        const int lane = threadIdx.x % kWarpSize;
        const int row = threadIdx.x % kWarpgroupSize / kWarpSize * 16 + lane % 16;
        const uint32_t to = shared_address(
            row < plan.windows.queries.size() ? Tile<S, kTile>{tile}.unit(row, lane / 16) : shared.padding);
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k) store_matrix(to ^ 32 * k, x[k]);
    }

    __device__ static void consumers_sync() {
        asm volatile("bar.sync 8, %0;\n" ::"n"(Traits::kConsumers) : "memory");
    }
    // Of a head, divided by the scale.
    __device__ void fill_bias(int head) const {
        consumers_sync();
        fill_bias_table<Traits::kConsumers>(p, plan.windows, head, shared.bias_table,
                                            1.0f / static_cast<float>(p.scale));
        consumers_sync();
        fill_bias_tile<Traits::kWarpgroups>(plan.windows, shared.bias_table, shared.bias_tile);
        consumers_sync();
    }

    __device__ int bias_entries() const {
        return static_cast<int>(p.shape.geometry.bias_height * p.shape.geometry.bias_width);
    }
    // The pieces of a head are counted over all of its sequences.
    __device__ float* bias_piece(int64_t head, int64_t piece) const {
        const int64_t bh = piece / p.bias_pieces * p.shape.heads + head;
        return static_cast<float*>(p.grad_relative_bias) +
               (bh * p.bias_pieces + piece % p.bias_pieces) * bias_entries();
    }
    // What the CTA has summed of a head, which begins anew.
    __device__ void store_bias(int head, int warpgroup, ScoreTile& grad_bias) const {
        if (!p.grad_relative_bias) return;
#pragma unroll 1
        for (int turn = 0; turn < Traits::kWarpgroups; ++turn) {
            consumers_sync();
            if (turn != warpgroup) continue;
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& sum = shared.bias_sum[8 * n + score_column() + e % 2][score_row() + e / 2 * 8];
                    sum = (turn == 0 ? 0 : sum) + grad_bias[n][e];
                    grad_bias[n][e] = 0;
                }
        }
        consumers_sync();
        const int first_cta = plan.cta_of(head * plan.windows_of_head(), gridDim.x);
        store_bias_gradient<Traits::kConsumers>(shared.bias_sum, p.shape.geometry, plan.windows.queries,
                                                1.0f / static_cast<float>(p.scale),
                                                bias_piece(head, static_cast<int>(blockIdx.x) - first_cta));
    }
};

// Compiled for Hopper alone, as the launch bounds tell.
template <class Traits>
__global__ void __launch_bounds__(kHasWarpgroups ? Traits::kThreads : kWarpSize, 1)
    window_attention_bwd_tile_sm90_kernel(const __grid_constant__ AttentionParams p,
                                          const __grid_constant__ TileGradSm90Plan plan,
                                          const __grid_constant__ TileGradSm90Maps maps) {
    if constexpr (kHasWarpgroups) {
        extern __shared__ __align__(1024) char tile_grad_memory[];
        const TileGradSm90<Traits> gradients{p, plan, maps,
                                             *reinterpret_cast<typename Traits::Shared*>(tile_grad_memory)};
        const int role = threadIdx.x / kWarpSize - Traits::kConsumers / kWarpSize;
        gradients.clear_padding();
        if (threadIdx.x == 0) gradients.init_barriers();
        __syncthreads();
        if (role < 0) {
            warpgroup_take_registers<Traits::kConsumerRegisters>();
            gradients.compute();
        } else {
            warpgroup_give_registers<Traits::kServiceRegisters>();
            if (role == 0 && threadIdx.x % kWarpSize == 0) gradients.load();
            if (role == 1 && threadIdx.x % kWarpSize == 0) gradients.store();
            if (role == 2) gradients.clear_bias_pieces();
        }
    }
}

// False where this kernel was not compiled for the device, or does not do what is asked.
template <class Traits>
bool launch_window_attention_bwd_tile_sm90(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    const auto kernel = window_attention_bwd_tile_sm90_kernel<Traits>;
    const Windows w = Windows::of(p);
    // At most, of windows and chunks that begin at multiples of their sizes.
    const auto count_chunks = [](int64_t window, int64_t chunk) {
        return (chunk - std::gcd(window, chunk) + window - 1) / chunk + 1;
    };
    const int64_t chunks_height = count_chunks(g.window_height, g.chunk_height),
                  chunks_width = count_chunks(g.window_width, g.chunk_width);
    if (p.dropout.threshold > 0 || p.key_padding_mask || p.landmark_bias || p.extents || g.is_causal ||
        g.num_prefix_tokens > 0 || g.windows_overlap() || w.queries.size() > Traits::kTile ||
        p.num_landmarks > Traits::kTile || chunks_height * chunks_width > Traits::kMostChunks)
        return false;
    const int64_t num_windows = p.shape.batch * p.shape.heads * w.num_windows;
    if (num_windows == 0) return true;
    constexpr int kBytes = sizeof(typename Traits::Shared);
    static LimitsOf limits_of;
    const KernelLimits& limits = limits_of(kernel);
    if (num_windows > INT_MAX || limits.threads < Traits::kThreads || limits.shared_bytes < kBytes)
        return false;
    const TileGradSm90Plan plan{
        .windows = w,
        .batch = static_cast<int>(p.shape.batch),
        .rows = static_cast<int>(g.window_rows()),
        .num_windows = num_windows,
        .has_landmarks = p.num_landmarks > 0,
        .has_terms = p.chunk_terms.omega != nullptr,
        .chunks_height = static_cast<int>(chunks_height),
        .chunks_width = static_cast<int>(chunks_width),
        .chunk_height = static_cast<int>(g.chunk_height),
        .chunk_width = static_cast<int>(g.chunk_width),
        .chunk_height_reciprocal = reciprocal(static_cast<int>(g.chunk_height)),
        .chunk_width_reciprocal = reciprocal(static_cast<int>(g.chunk_width)),
    };
    const int64_t ctas = std::min<int64_t>(num_windows, multiprocessors());
    const int64_t most_pieces =
        std::min(plan.windows_of_head(), plan.windows_of_head() * ctas / num_windows + 2);
    if (p.grad_relative_bias && most_pieces > p.shape.batch * p.bias_pieces) return false;

    TileGradSm90Maps maps;
    using S = typename Traits::S;
    const auto make_token_map = [&](CUtensorMap& map, const Rows& rows) {
        return make_map<S>(map, p.shape, rows, g.grid_height, g.grid_width, w.queries.height,
                           w.queries.width);
    };
    const auto make_term_map = [&](CUtensorMap& map, const void* data) {
        return !plan.has_terms || make_map<S>(map, p.shape, whole_rows(p.shape, data, g.num_chunks()),
                                              g.chunk_rows(), g.chunk_columns(), chunks_height, chunks_width);
    };
    const ChunkTerms& terms = p.chunk_terms;
    if (!make_token_map(maps.query, p.query) || !make_token_map(maps.key, p.key) ||
        !make_token_map(maps.value, p.value) || !make_token_map(maps.grad_output, p.grad_output) ||
        !make_landmark_map<S>(maps.landmark_key, p, p.landmark_key, Traits::kTile) ||
        !make_landmark_map<S>(maps.landmark_value, p, p.landmark_value, Traits::kTile) ||
        !make_term_map(maps.terms[0], terms.omega) || !make_term_map(maps.terms[1], terms.grad_beta) ||
        !make_term_map(maps.terms[2], terms.grad_key_mean) ||
        !make_term_map(maps.terms[3], terms.grad_query_mean) ||
        !make_token_map(maps.grad_query, p.grad_query) || !make_token_map(maps.grad_key, p.grad_key) ||
        !make_token_map(maps.grad_value, p.grad_value))
        return false;

    kernel<<<static_cast<unsigned>(ctas), Traits::kThreads, kBytes, stream>>>(p, plan, maps);
    return true;
}

} // namespace eva_attn::cuda::mma
