// Last kernel of the joint attention's backward with Hopper's asynchronous copies and products: for windows
// of a grid or of a sequence, of at most 64 tokens, without overlap, for up to 64 landmarks, and none of the
// options but the relative bias. A warpgroup takes a window as one tile.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "kernels/cuda/dependent_launch.cuh"
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
    // Warpgroups that compute; of one more, three warps load, and a warp stores.
    static constexpr int kWarpgroups = 2;
    static constexpr int kConsumers = kWarpgroups * kWarpgroupSize;
    static constexpr int kThreads = kConsumers + kWarpgroupSize;
    static constexpr int kConsumerRegisters = 232, kServiceRegisters = 40;
    static constexpr int kSlots = 4, kLandmarkSlots = 2;
    static_assert(kSlots % kWarpgroups == 0); // a slot's phases are known by their parity to one of them
    static constexpr int kTerms = 4, kMostChunks = 16; // rows that a chunk adds to its tokens' gradients
    static constexpr int kMaxTableSize = 225;          // (2 h - 1) (2 w - 1)

    struct Window { // gradients replace the rows on their way out
        alignas(1024) S query[kTileElements];
        alignas(1024) S key[kTileElements];
        alignas(1024) S value[kTileElements]; // then the gradients of the scores [key, query]
        alignas(1024) S grad_output[kTileElements];
        // What the tokens get as members of chunks: omega, grad_beta, grad_key_mean, grad_query_mean.
        alignas(1024) S terms[kTerms][kMostChunks * kTile];
    };
    struct Landmarks {
        alignas(1024) S key[kTileElements];
        alignas(1024) S value[kTileElements];
    };
    struct Numbers {                          // of tokens
        float logsumexp[kTile], delta[kTile]; // in units of log 2, times the scale
        uint32_t member[kTile];               // weight and gradient in the chunk
        int chunk[kTile];                     // of the window's, -1 outside of the grid
    };
    struct Shared {
        Window windows[kSlots];
        Landmarks landmarks[kLandmarkSlots];
        union {
            struct {
                float4 bias_tile[kScoreTileVectors];
                float bias_table[kMaxTableSize];
            };
            float bias_sum[kTile][kTile + 1]; // [key, query]
        };
        alignas(16) Numbers numbers[kSlots];
        alignas(128) S padding[kTile]; // rows beyond the window's go here, so that they stay zeros elsewhere
        uint64_t window_full[kSlots], gradients_full[kSlots], window_empty[kSlots];
        uint64_t landmarks_full[kLandmarkSlots], landmarks_empty[kLandmarkSlots];
        uint64_t numbers_full[kSlots], numbers_empty[kSlots];
    };
};

struct TileGradSm90Plan {
    Windows windows;
    int batch, rows;
    WindowShares shares;
    bool has_landmarks, has_terms;
    int chunks_height, chunks_width; // a box that holds the chunks of any window
    int chunk_height, chunk_width;
    uint32_t chunk_height_reciprocal, chunk_width_reciprocal;
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

    // Rows of tiles that no copy reaches; by the warpgroups.
    __device__ void clear_padding() const {
        const auto clear = [](S* tile, int first, int rows) {
            for (int i = first * 8 + threadIdx.x; i < rows * 8; i += Traits::kConsumers)
                reinterpret_cast<uint4*>(tile)[i] = uint4{0, 0, 0, 0};
        };
        const int size = plan.windows.queries.size(),
                  chunks = plan.has_terms ? plan.chunks_height * plan.chunks_width : 0;
        for (Window& window : shared.windows) {
            for (S* tile : {window.query, window.key, window.value, window.grad_output})
                clear(tile, size, kTile);
            for (S* tile : window.terms) clear(tile, chunks, Traits::kMostChunks);
        }
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
            barrier_init(&shared.numbers_full[i], kWarpSize);
            barrier_init(&shared.numbers_empty[i], kWarpgroupSize);
        }
        for (int i = 0; i < Traits::kLandmarkSlots; ++i) {
            barrier_init(&shared.landmarks_full[i], 1);
            barrier_init(&shared.landmarks_empty[i], Traits::kWarpgroups * kWarps);
        }
        barrier_init_fence();
    }

    static constexpr int kRowBytes = kTile * static_cast<int>(sizeof(S));

    // By one thread.
    __device__ void load() const {
        const Windows& w = plan.windows;
        const int chunks = plan.has_terms ? plan.chunks_height * plan.chunks_width : 0;
        RingCursor slot, landmark_slot;
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            const int y0 = at.row * w.queries.height, x0 = at.column * w.queries.width;
            Window& window = shared.windows[slot.slot];
            uint64_t* const full = &shared.window_full[slot.slot];
            barrier_wait(&shared.window_empty[slot.slot], slot.phase ^ 1);
            barrier_arrive_expect(full, (4 * w.queries.size() + Traits::kTerms * chunks) * kRowBytes);
            load_box(window.query, maps.query, full, 0, x0, y0, at.head, at.batch);
            load_box(window.key, maps.key, full, 0, x0, y0, at.head, at.batch);
            load_box(window.grad_output, maps.grad_output, full, 0, x0, y0, at.head, at.batch);
            load_box(window.value, maps.value, full, 0, x0, y0, at.head, at.batch);
            if (plan.has_terms) {
                const int y = y0 / plan.chunk_height, x = x0 / plan.chunk_width;
#pragma unroll
                for (int i = 0; i < Traits::kTerms; ++i)
                    load_box(window.terms[i], maps.terms[i], full, 0, x, y, at.head, at.batch);
            }
            slot.advance(Traits::kSlots);
            if (plan.has_landmarks && at.enters_sequence) {
                Landmarks& landmarks = shared.landmarks[landmark_slot.slot];
                uint64_t* const landmarks_full = &shared.landmarks_full[landmark_slot.slot];
                barrier_wait(&shared.landmarks_empty[landmark_slot.slot], landmark_slot.phase ^ 1);
                barrier_arrive_expect(landmarks_full, 2 * kTile * kRowBytes);
                load_box(landmarks.key, maps.landmark_key, landmarks_full, 0, 0, 0, at.head, at.batch);
                load_box(landmarks.value, maps.landmark_value, landmarks_full, 0, 0, 0, at.head, at.batch);
                landmark_slot.advance(Traits::kLandmarkSlots);
            }
        }
    }

    // By two warps, which take turns at the windows.
    __device__ void load_numbers(int turn) const {
        RingCursor slot{.slot = turn};
        WindowCursor at = WindowCursor::first(plan);
        if (turn > 0) at.advance(plan);
#pragma unroll 1
        for (; at.left > 0; at.advance(plan), at.advance(plan)) {
            const TokenBox box = plan.windows.query_box(at.row, at.column);
            const int in_chunk_y = box.y0 % plan.chunk_height, in_chunk_x = box.x0 % plan.chunk_width;
            const int64_t first =
                (static_cast<int64_t>(at.batch) * p.shape.heads + at.head) * plan.windows.num_tokens;
            float logsumexp[2], delta[2], weight[2], grad[2];
            int chunk[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = threadIdx.x % kWarpSize + kWarpSize * i, token = box.token(row);
                const auto load = [&](const void* data, float otherwise) {
                    return data && token >= 0 ? (static_cast<const float*>(data) + first)[token] : otherwise;
                };
                logsumexp[i] = load(p.logsumexp, kInfinity);
                delta[i] = load(p.delta, 0.0f);
                weight[i] = load(p.chunk_terms.token_weight, 0.0f);
                grad[i] = load(p.chunk_terms.token_grad, 0.0f);
                const int y = divide(row, box.shape.width_reciprocal), x = row - y * box.shape.width;
                chunk[i] = divide(in_chunk_y + y, plan.chunk_height_reciprocal) * plan.chunks_width +
                           divide(in_chunk_x + x, plan.chunk_width_reciprocal);
                if (token < 0 && row < box.shape.size()) chunk[i] = -1;
            }
            barrier_wait(&shared.numbers_empty[slot.slot], slot.phase ^ 1);
            auto& numbers = shared.numbers[slot.slot];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = threadIdx.x % kWarpSize + kWarpSize * i;
                numbers.logsumexp[row] = logsumexp[i] * kLog2e;
                numbers.delta[row] = delta[i] * static_cast<float>(p.scale);
                numbers.member[row] = pack<S>(weight[i], grad[i]);
                numbers.chunk[row] = chunk[i];
            }
            release_by_all(&shared.numbers_full[slot.slot]);
            slot.advance(Traits::kSlots, 2);
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
            store_box(window.value, maps.grad_query, 0, x0, y0, at.head, at.batch);
            store_box(window.query, maps.grad_key, 0, x0, y0, at.head, at.batch);
            store_box(window.grad_output, maps.grad_value, 0, x0, y0, at.head, at.batch);
            store_commit();
            store_wait_read();
            barrier_arrive(&shared.window_empty[slot.slot]);
            slot.advance(Traits::kSlots);
        }
    }

    // Zeros in those pieces of the bias gradient that no CTA writes; by one warp.
    __device__ void clear_bias_pieces() const {
        if (!p.grad_relative_bias) return;
        const int pieces = plan.batch * static_cast<int>(p.bias_pieces),
                  heads = static_cast<int>(p.shape.heads);
        const int entries = bias_entries();
#pragma unroll 1
        for (int i = blockIdx.x; i < heads * pieces; i += gridDim.x) {
            const int head = i / pieces, piece = i % pieces;
            if (piece <= plan.shares.last_part(head) - plan.shares.first_part(head)) continue;
            float* const to = bias_piece(head, piece);
            for (int j = threadIdx.x % kWarpSize; j < entries; j += kWarpSize) to[j] = 0;
        }
    }

    // By the warpgroups, which take turns at the windows.
    __device__ void compute() const {
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroupSize, 0);
        const WindowShares& shares = plan.shares;
        const int begin = shares.begin(blockIdx.x), count = shares.count(blockIdx.x);
        ScoreTile grad_bias = {}; // summed over windows
        int head = begin / shares.of_head - 1;
        int next_head = 0, next_sequence = 0; // windows with which the CTA enters them
        int piece = static_cast<int>(blockIdx.x) / shares.heads -
                    shares.first_part(head + 1); // of the head's bias gradient
        RingCursor slot{.slot = warpgroup}, landmark_slot;
#pragma unroll 1
        for (int window = warpgroup;; window += Traits::kWarpgroups) {
            // All go to every head.
            while (next_head <= min(window, count - 1)) {
                if (next_head > 0) {
                    store_bias(head, piece, warpgroup, grad_bias);
                    piece = 0; // the first one, as a later head begins here
                }
                fill_bias(++head);
                next_head = shares.apart ? count : (head + 1) * shares.of_head - begin;
            }
            if (window >= count) break;
            // And wait for the landmarks of every sequence, as only the parity of phases tells them apart.
            while (plan.has_landmarks && next_sequence <= window) {
                if (next_sequence > 0) {
                    release(&shared.landmarks_empty[landmark_slot.slot]);
                    landmark_slot.advance(Traits::kLandmarkSlots);
                }
                barrier_wait(&shared.landmarks_full[landmark_slot.slot], landmark_slot.phase);
                next_sequence = shares.next_sequence(next_sequence, begin, plan.windows.num_windows);
            }
            find_gradients(slot, shared.landmarks[landmark_slot.slot], warpgroup, grad_bias);
            release(&shared.gradients_full[slot.slot]);
            slot.advance(Traits::kSlots, Traits::kWarpgroups);
        }
        store_bias(head, piece, warpgroup, grad_bias);
    }

  private:
    using Factor = uint32_t[4]; // the first one [64, 16] of a product
    using Operand = Factor[kTile / 16];

    __device__ void find_gradients(const RingCursor& slot, const Landmarks& landmarks, int warpgroup,
                                   ScoreTile& grad_bias) const {
        Window& window = shared.windows[slot.slot];
        const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
        const uint64_t query = tile_descriptor(window.query), key = tile_descriptor(window.key),
                       value = tile_descriptor(window.value),
                       grad_output = tile_descriptor(window.grad_output),
                       landmark_key = tile_descriptor(landmarks.key),
                       landmark_value = tile_descriptor(landmarks.value);
        // Of the window [key, query], of the landmarks [query, landmark].
        ScoreTile score, grad_weight, landmark_score, landmark_grad_weight;
        begin_with_bias(score, shared.bias_tile);
        barrier_wait(&shared.window_full[slot.slot], slot.phase);
        warpgroup_fence();
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            warpgroup_multiply<S, 0, 0>(score, key + 2 * d, query + 2 * d, 1);
            warpgroup_multiply<S, 0, 0>(grad_weight, value + 2 * d, grad_output + 2 * d, d > 0);
        }
        warpgroup_commit();
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            warpgroup_multiply<S, 0, 0>(landmark_score, query + 2 * d, landmark_key + 2 * d, d > 0);
            warpgroup_multiply<S, 0, 0>(landmark_grad_weight, grad_output + 2 * d, landmark_value + 2 * d,
                                        d > 0);
        }
        warpgroup_commit();

        // To weights, and to the gradients of the scores times the scale.
        const auto weigh = [&](ScoreTile& score, ScoreTile& grad_weight, int n, const float (&lse)[4],
                               const float (&delta)[4], int columns) {
            if (n == kTile / 8 - 1 && columns <= 8 * n) { // as of 7 x 7
#pragma unroll
                for (int e = 0; e < 4; ++e) score[n][e] = grad_weight[n][e] = 0;
                return;
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                score[n][e] = exp2_approx(score[n][e] * scale_log2 - lse[e]);
                grad_weight[n][e] = score[n][e] * (grad_weight[n][e] * scale - delta[e]);
            }
        };
        const auto& numbers = shared.numbers[slot.slot];
        barrier_wait(&shared.numbers_full[slot.slot], slot.phase);
        uint32_t members[2];
        int chunks[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            members[r] = numbers.member[score_row() + 8 * r];
            chunks[r] = numbers.chunk[score_row() + 8 * r];
        }
        Factor key_factor, value_factor, mean_factor;
        find_factors(key_factor, value_factor, mean_factor, members, chunks);
        warpgroup_wait<1>();
        fence_registers(score);
        fence_registers(grad_weight);
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (chunks[r] < 0) {
#pragma unroll
                for (int n = 0; n < kTile / 8; ++n) score[n][2 * r] = score[n][2 * r + 1] = -kInfinity;
            }
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
            const int column = 8 * n + score_column();
            const float2 lse = *reinterpret_cast<const float2*>(&numbers.logsumexp[column]),
                         delta = *reinterpret_cast<const float2*>(&numbers.delta[column]);
            weigh(score, grad_weight, n, {lse.x, lse.y, lse.x, lse.y}, {delta.x, delta.y, delta.x, delta.y},
                  plan.windows.queries.size());
#pragma unroll
            for (int e = 0; e < 4; ++e) grad_bias[n][e] += grad_weight[n][e];
        }
        Operand weight, grad_score;
        pack_tile(weight, score);
        pack_tile(grad_score, grad_weight);
        for (Factor& factor : weight) fence_factor(factor);
        for (Factor& factor : grad_score) fence_factor(factor);

        const auto term = [&](int i) { return tile_descriptor(window.terms[i]); };
        ScoreTile grad_query, grad_key, grad_value;
        warpgroup_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            warpgroup_multiply<S, 1>(grad_value, weight[k], grad_output + 128 * k, k > 0);
            warpgroup_multiply<S, 1>(grad_key, grad_score[k], query + 128 * k, k > 0);
        }
        warpgroup_multiply<S, 1>(grad_key, key_factor, term(0), 1);
        warpgroup_multiply<S, 1>(grad_value, value_factor, term(1), 1);
        warpgroup_multiply<S, 1>(grad_key, mean_factor, term(2), 1);
        warpgroup_commit();
        warpgroup_sync(warpgroup); // all are done with the values
        put(grad_score, window.value);
        fence_async_proxy();

        warpgroup_wait<1>();
        fence_registers(landmark_score);
        fence_registers(landmark_grad_weight);
        const uint32_t hidden = columns_from(static_cast<int>(p.num_landmarks));
        hide(landmark_score, {hidden, hidden});
        const float lse[] = {numbers.logsumexp[score_row()], numbers.logsumexp[score_row() + 8]},
                    delta[] = {numbers.delta[score_row()], numbers.delta[score_row() + 8]};
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
            weigh(landmark_score, landmark_grad_weight, n, {lse[0], lse[0], lse[1], lse[1]},
                  {delta[0], delta[0], delta[1], delta[1]}, static_cast<int>(p.num_landmarks));
        Operand landmark_grad_score;
        pack_tile(landmark_grad_score, landmark_grad_weight);
        for (Factor& factor : landmark_grad_score) fence_factor(factor);
        release_by_all(&shared.numbers_empty[slot.slot]);
        warpgroup_sync(warpgroup); // the gradients of the scores are there
        warpgroup_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            warpgroup_multiply<S, 1, 1>(grad_query, value + 128 * k, key + 128 * k, k > 0);
            warpgroup_multiply<S, 1>(grad_query, landmark_grad_score[k], landmark_key + 128 * k, 1);
        }
        warpgroup_multiply<S, 1>(grad_query, mean_factor, term(3), 1);
        warpgroup_commit();

        Operand query_rows, key_rows, value_rows;
        warpgroup_wait<1>();
        fence_registers(grad_value);
        fence_registers(grad_key);
        pack_tile(value_rows, grad_value);
        subtract_keys(grad_key, window.key, members);
        pack_tile(key_rows, grad_key);
        warpgroup_sync(warpgroup); // all are done with the queries and the gradients of outputs
        put(value_rows, window.grad_output);
        put(key_rows, window.query);
        warpgroup_wait();
        fence_registers(grad_query);
        pack_tile(query_rows, grad_query);
        warpgroup_sync(warpgroup); // all are done with the gradients of the scores
        put(query_rows, window.value);
        fence_async_proxy();
    }

    // By which the terms of chunks are multiplied for keys, values and the means.
    __device__ static void find_factors(Factor& key, Factor& value, Factor& mean,
                                        const uint32_t (&members)[2], const int (&chunks)[2]) {
        const uint32_t one = pack<S>(1, 1);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t weight = __byte_perm(members[r], 0, 0x1010),
                           grad = __byte_perm(members[r], 0, 0x3232),
                           half = chunks[r] % 2 ? 0xffff0000u : 0xffffu;
#pragma unroll
            for (int i = 0; i < 2; ++i) { // columns score_column() + 8 i and one further
                const uint32_t is_member = (chunks[r] & ~1) == score_column() + 8 * i ? half : 0;
                key[2 * i + r] = grad & is_member;
                value[2 * i + r] = weight & is_member;
                mean[2 * i + r] = one & is_member;
            }
        }
        fence_factor(key), fence_factor(value), fence_factor(mean);
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
    // A row of a tile that the lane names to the instructions for matrices, of 16 columns.
    __device__ static int matrix_row() {
        return threadIdx.x % kWarpgroupSize / kWarpSize * 16 + threadIdx.x % 16;
    }
    __device__ static S* matrix_unit(S* tile) {
        return Tile<S, kTile>{tile}.unit(matrix_row(), threadIdx.x % kWarpSize / 16);
    }
    // The rows of a window into a tile.
    __device__ void put(const Operand& x, S* tile) const {
        const uint32_t to =
            shared_address(matrix_row() < plan.windows.queries.size() ? matrix_unit(tile) : shared.padding);
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k) store_matrix(to ^ 32 * k, x[k]);
    }
    // What keys as members of chunks take from their own gradients.
    __device__ static void subtract_keys(ScoreTile& grad_key, S* key, const uint32_t (&members)[2]) {
        const float chunk_grad[] = {unpack<S>(members[0]).y, unpack<S>(members[1]).y};
        const uint32_t from = shared_address(matrix_unit(key));
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k) {
            uint32_t x[4];
            load_matrix(x, from ^ 32 * k);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = unpack<S>(x[i]);
                float* const to = &grad_key[2 * k + i / 2][i % 2 * 2];
                to[0] -= chunk_grad[i % 2] * pair.x;
                to[1] -= chunk_grad[i % 2] * pair.y;
            }
        }
    }

    __device__ static void consumers_sync() { sync_threads(8, Traits::kConsumers); }
    // Of a head, divided by the scale.
    __device__ void fill_bias(int head) const {
        consumers_sync();
        fill_bias_table<Traits::kConsumers>(p, plan.windows, head, shared.bias_table,
                                            1.0f / static_cast<float>(p.scale));
        consumers_sync();
        fill_bias_tile<Traits::kWarpgroups, true>(plan.windows, shared.bias_table, shared.bias_tile);
        consumers_sync();
    }

    __device__ int bias_entries() const {
        return static_cast<int>(p.shape.geometry.bias_height * p.shape.geometry.bias_width);
    }
    // The pieces of a head are counted over all of its sequences.
    __device__ float* bias_piece(int head, int piece) const {
        return static_cast<float*>(p.grad_relative_bias) +
               (head * plan.batch * p.bias_pieces + piece) * bias_entries();
    }
    // What the CTA has summed of a head, which begins anew.
    __device__ void store_bias(int head, int piece, int warpgroup, ScoreTile& grad_bias) const {
        if (!p.grad_relative_bias) return;
#pragma unroll 1
        for (int turn = 0; turn < Traits::kWarpgroups; ++turn) {
            consumers_sync(); // a checker of races asks for one on either side of a turn
            if (turn == warpgroup) {
#pragma unroll
                for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float& sum = shared.bias_sum[score_row() + e / 2 * 8][8 * n + score_column() + e % 2];
                        sum = (turn == 0 ? 0 : sum) + grad_bias[n][e];
                        grad_bias[n][e] = 0;
                    }
            }
            consumers_sync();
        }
        store_bias_gradient<Traits::kConsumers>(shared.bias_sum, p.shape.geometry, plan.windows.queries,
                                                1.0f / static_cast<float>(p.scale), bias_piece(head, piece));
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
        const bool is_first = threadIdx.x % kWarpSize == 0;
        if (role < 0) gradients.clear_padding();
        if (role == 0 && is_first) gradients.init_barriers();
        __syncthreads();
        wait_for_dependencies();
        if (role < 0) {
            warpgroup_take_registers<Traits::kConsumerRegisters>();
            gradients.compute();
        } else {
            warpgroup_give_registers<Traits::kServiceRegisters>();
            if (role == 0 && is_first) gradients.load();
            if (role == 1 && is_first) gradients.store();
            if (role >= 2) gradients.load_numbers(role - 2);
            if (role == 3) gradients.clear_bias_pieces();
        }
    }
}

// False where this kernel was not compiled for the device, or does not do what is asked.
template <class Traits>
bool launch_window_attention_bwd_tile_sm90(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    const auto kernel = window_attention_bwd_tile_sm90_kernel<Traits>;
    Windows w = Windows::of(p);
    w.table_size = w.table_height * w.table_width; // no place is hidden
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
        .shares = WindowShares::of(p.shape, g.window_rows(), g.window_columns()),
        .has_landmarks = p.num_landmarks > 0,
        .has_terms = p.chunk_terms.omega != nullptr,
        .chunks_height = static_cast<int>(chunks_height),
        .chunks_width = static_cast<int>(chunks_width),
        .chunk_height = static_cast<int>(g.chunk_height),
        .chunk_width = static_cast<int>(g.chunk_width),
        .chunk_height_reciprocal = reciprocal(static_cast<int>(g.chunk_height)),
        .chunk_width_reciprocal = reciprocal(static_cast<int>(g.chunk_width)),
    };
    if (p.grad_relative_bias && plan.shares.most_of_head() > p.shape.batch * p.bias_pieces) return false;

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

    launch_dependent(kernel, plan.shares.ctas(), Traits::kThreads, kBytes, stream, p, plan, maps);
    return true;
}

} // namespace eva_attn::cuda::mma
