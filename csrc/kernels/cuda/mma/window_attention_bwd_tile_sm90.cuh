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
    static constexpr int kSlots = 5, kLandmarkSlots = 2;
    static constexpr int kTerms = 4, kMostChunks = 16; // rows that a chunk adds to its tokens' gradients
    static constexpr int kMaxTableSize = 225;          // (2 h - 1) (2 w - 1)

    struct Window { // gradients replace the rows on their way out
        alignas(1024) S query[kTileElements];
        alignas(1024) S key[kTileElements];
        alignas(1024) S value[kTileElements]; // then the gradients of the scores [key, query]
        alignas(1024) S grad_output[kTileElements];
    };
    // What the tokens get as members of chunks: omega, grad_beta, grad_key_mean, grad_query_mean.
    struct Terms {
        alignas(1024) S rows[kTerms][kMostChunks * kTile];
    };
    struct Landmarks {
        alignas(1024) S key[kTileElements];
        alignas(1024) S value[kTileElements];
    };
    struct Numbers {                          // of tokens
        float logsumexp[kTile], delta[kTile]; // in units of log 2, times the scale
        uint32_t chunk[kTile];                // weight and gradient as a member
    };
    struct Shared {
        Window windows[kSlots];
        Landmarks landmarks[kLandmarkSlots];
        Terms terms[kWarpgroups];
        union {
            struct {
                float4 bias_tile[kScoreTileVectors];
                float bias_table[kMaxTableSize];
            };
            float bias_sum[kTile][kTile + 1]; // [key, query]
        };
        alignas(16) Numbers numbers[kWarpgroups];
        alignas(128) S padding[kTile]; // rows beyond the window's go here, so that they stay zeros elsewhere
        uint64_t window_full[kSlots], gradients_full[kSlots], window_empty[kSlots];
        uint64_t landmarks_full[kLandmarkSlots], landmarks_empty[kLandmarkSlots];
        uint64_t terms_full[kWarpgroups], terms_empty[kWarpgroups];
        uint64_t numbers_full[kWarpgroups], numbers_empty[kWarpgroups];
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
    using Terms = typename Traits::Terms;
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
        for (Window& window : shared.windows)
            for (S* tile : {window.query, window.key, window.value, window.grad_output})
                clear(tile, size, kTile);
        for (Terms& terms : shared.terms)
            for (S* tile : terms.rows)
                clear(tile, plan.has_terms ? plan.chunks_height * plan.chunks_width : 0, Traits::kMostChunks);
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
        for (int i = 0; i < Traits::kWarpgroups; ++i) {
            barrier_init(&shared.terms_full[i], 1);
            barrier_init(&shared.terms_empty[i], kWarps);
            barrier_init(&shared.numbers_full[i], 1);
            barrier_init(&shared.numbers_empty[i], kWarps);
        }
        barrier_init_fence();
    }

    static constexpr int kRowBytes = kTile * static_cast<int>(sizeof(S));

    // By one thread.
    __device__ void load() const {
        const Windows& w = plan.windows;
        RingCursor slot, landmark_slot;
        bool is_first = true;
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            const int y0 = at.row * w.queries.height, x0 = at.column * w.queries.width;
            Window& window = shared.windows[slot.slot];
            uint64_t* const full = &shared.window_full[slot.slot];
            barrier_wait(&shared.window_empty[slot.slot], slot.phase ^ 1);
            barrier_arrive_expect(full, 4 * w.queries.size() * kRowBytes);
            load_box(window.query, maps.query, full, 0, x0, y0, at.head, at.batch);
            load_box(window.key, maps.key, full, 0, x0, y0, at.head, at.batch);
            load_box(window.grad_output, maps.grad_output, full, 0, x0, y0, at.head, at.batch);
            load_box(window.value, maps.value, full, 0, x0, y0, at.head, at.batch);
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
    __device__ void load_terms() const {
        const Windows& w = plan.windows;
        RingCursor slot;
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            const int y = at.row * w.queries.height / plan.chunk_height,
                      x = at.column * w.queries.width / plan.chunk_width;
            uint64_t* const full = &shared.terms_full[slot.slot];
            barrier_wait(&shared.terms_empty[slot.slot], slot.phase ^ 1);
            barrier_arrive_expect(full, Traits::kTerms * plan.chunks_height * plan.chunks_width * kRowBytes);
#pragma unroll
            for (int i = 0; i < Traits::kTerms; ++i)
                load_box(shared.terms[slot.slot].rows[i], maps.terms[i], full, 0, x, y, at.head, at.batch);
            slot.advance(Traits::kWarpgroups);
        }
    }

    // By one warp.
    __device__ void load_numbers() const {
        RingCursor slot;
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            const TokenBox box = plan.windows.query_box(at.row, at.column);
            const int64_t first =
                (static_cast<int64_t>(at.batch) * p.shape.heads + at.head) * plan.windows.num_tokens;
            float logsumexp[2], delta[2], weight[2], grad[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = box.token(threadIdx.x % kWarpSize + kWarpSize * i);
                const auto load = [&](const void* data, float otherwise) {
                    return data && token >= 0 ? (static_cast<const float*>(data) + first)[token] : otherwise;
                };
                logsumexp[i] = load(p.logsumexp, kInfinity);
                delta[i] = load(p.delta, 0.0f);
                weight[i] = load(p.chunk_terms.token_weight, 0.0f);
                grad[i] = load(p.chunk_terms.token_grad, 0.0f);
            }
            barrier_wait(&shared.numbers_empty[slot.slot], slot.phase ^ 1);
            auto& numbers = shared.numbers[slot.slot];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = threadIdx.x % kWarpSize + kWarpSize * i;
                numbers.logsumexp[row] = logsumexp[i] * kLog2e;
                numbers.delta[row] = delta[i] * static_cast<float>(p.scale);
                numbers.chunk[row] = pack<S>(weight[i], grad[i]);
            }
            release(&shared.numbers_full[slot.slot]);
            slot.advance(Traits::kWarpgroups);
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
        uint32_t phase = 0; // of what the warpgroup alone has
#pragma unroll 1
        for (WindowCursor at = WindowCursor::first(plan); at.left > 0; at.advance(plan)) {
            if (at.head != head) {
                if (head >= 0) store_bias(head, warpgroup, grad_bias);
                fill_bias(at.head);
            }
            head = at.head;
            if (turn == warpgroup) {
                // A slot's phases go from one warpgroup to the other. None comes here while the slot's last
                // window is still on its way: then there were no numbers for the window before this one.
                barrier_wait(&shared.window_full[slot.slot], slot.phase);
                if (plan.has_landmarks)
                    barrier_wait(&shared.landmarks_full[landmark_slot.slot], landmark_slot.phase);
                find_gradients(shared.windows[slot.slot], shared.landmarks[landmark_slot.slot],
                               plan.windows.query_box(at.row, at.column), phase, warpgroup, grad_bias);
                phase ^= 1;
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

    __device__ void find_gradients(Window& window, const Landmarks& landmarks, const TokenBox& box,
                                   uint32_t phase, int warpgroup, ScoreTile& grad_bias) const {
        const float scale = static_cast<float>(p.scale), scale_log2 = scale * kLog2e;
        const uint64_t query = tile_descriptor(window.query), key = tile_descriptor(window.key),
                       value = tile_descriptor(window.value),
                       grad_output = tile_descriptor(window.grad_output),
                       landmark_key = tile_descriptor(landmarks.key),
                       landmark_value = tile_descriptor(landmarks.value);
        // Of the window [key, query], of the landmarks [query, landmark].
        ScoreTile score, grad_weight, landmark_score, landmark_grad_weight;
        begin_with_bias(score, shared.bias_tile);
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
        const auto& numbers = shared.numbers[warpgroup];
        barrier_wait(&shared.numbers_full[warpgroup], phase);
        const uint32_t members[] = {numbers.chunk[score_row()], numbers.chunk[score_row() + 8]};
        Factor key_factor, value_factor, mean_factor;
        find_factors(key_factor, value_factor, mean_factor, box, members);
        warpgroup_wait<1>();
        fence_registers(score);
        fence_registers(grad_weight);
        if (!box.is_whole()) {
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                if (box.token(score_row() + 4 * e) < 0) {
#pragma unroll
                    for (int n = 0; n < kTile / 8; ++n) score[n][e] = score[n][e + 1] = -kInfinity;
                }
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
        warpgroup_sync(warpgroup); // all are done with the values
        put(grad_score, window.value);
        for (Factor& factor : weight) fence_factor(factor);
        for (Factor& factor : grad_score) fence_factor(factor);

        if (plan.has_terms) barrier_wait(&shared.terms_full[warpgroup], phase);
        const auto term = [&](int i) { return tile_descriptor(shared.terms[warpgroup].rows[i]); };
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
        release(&shared.numbers_empty[warpgroup]);
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
        warpgroup_wait();
        fence_registers(grad_query);
        pack_tile(query_rows, grad_query);
        if (plan.has_terms) release(&shared.terms_empty[warpgroup]);
        warpgroup_sync(warpgroup); // all are done with the rows
        put(value_rows, window.value);
        put(key_rows, window.key);
        put(query_rows, window.query);
        fence_async_proxy();
    }

    // By which the terms of chunks are multiplied for keys, values and the means.
    __device__ void find_factors(Factor& key, Factor& value, Factor& mean, const TokenBox& box,
                                 const uint32_t (&members)[2]) const {
        const auto half = [](int column) { return column % 2 ? 0xffff0000u : 0xffffu; };
        const int in_chunk_y = box.y0 % plan.chunk_height, in_chunk_x = box.x0 % plan.chunk_width;
        const uint32_t one = pack<S>(1, 1);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const BoxShape& shape = plan.windows.queries;
            const int row = score_row() + 8 * r, y = divide(row, shape.width_reciprocal);
            const int chunk = divide(in_chunk_y + y, plan.chunk_height_reciprocal) * plan.chunks_width +
                              divide(in_chunk_x + row - y * shape.width, plan.chunk_width_reciprocal);
            const uint32_t weight = __byte_perm(members[r], 0, 0x1010),
                           grad = __byte_perm(members[r], 0, 0x3232);
#pragma unroll
            for (int i = 0; i < 2; ++i) { // columns score_column() + 8 i and one further
                const uint32_t is_member = (chunk & ~1) == score_column() + 8 * i ? half(chunk) : 0;
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

    __device__ static void consumers_sync() {
        asm volatile("bar.sync 8, %0;\n" ::"n"(Traits::kConsumers) : "memory");
    }
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
    __device__ float* bias_piece(int64_t head, int64_t piece) const {
        return static_cast<float*>(p.grad_relative_bias) +
               (head * plan.batch * p.bias_pieces + piece) * bias_entries();
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
                    float& sum = shared.bias_sum[score_row() + e / 2 * 8][8 * n + score_column() + e % 2];
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
        wait_for_dependencies();
        if (role < 0) {
            warpgroup_take_registers<Traits::kConsumerRegisters>();
            gradients.compute();
        } else {
            warpgroup_give_registers<Traits::kServiceRegisters>();
            if (role == 0 && threadIdx.x % kWarpSize == 0) gradients.load();
            if (role == 1 && threadIdx.x % kWarpSize == 0) gradients.store();
            if (role == 2) {
                gradients.load_numbers();
                gradients.clear_bias_pieces();
            }
            if (role == 3 && plan.has_terms && threadIdx.x % kWarpSize == 0) gradients.load_terms();
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

    launch_dependent(kernel, ctas, Traits::kThreads, kBytes, stream, p, plan, maps);
    return true;
}

} // namespace eva_attn::cuda::mma
