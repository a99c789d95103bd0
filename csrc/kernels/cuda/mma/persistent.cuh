// How the warps of a persistent block, each with a part of its own, go through windows and slots of tiles.
#pragma once

#include <cuda_fp16.h>
#include <type_traits>

#include "kernels/cuda/mma/windows.cuh"
#include "kernels/cuda/tma.cuh"

namespace eva_attn::cuda::mma {

constexpr int kWarpgroupSize = 128;

// Barriers 1 onward belong to the warpgroups.
__device__ inline void warpgroup_sync(int warpgroup) { sync_threads(1 + warpgroup, kWarpgroupSize); }
// One arrival, when the whole warp is done.
__device__ inline void release(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) barrier_arrive(barrier);
}
// One of each thread, where threads both write and read what is handed over: a checker of races follows an
// arrival of each thread, but not one of a lane for its warp.
__device__ inline void release_by_all(uint64_t* barrier) { barrier_arrive(barrier); }

// Boxes of a problem's rows [B, H, height, width, D], or of those of a [B, H, count, D] tensor that is whole,
// as landmarks and all that belongs to chunks. False where the hardware can't.
template <class S>
bool make_map(CUtensorMap& map, const Shape& shape, const Rows& rows, int64_t height, int64_t width,
              int64_t box_height, int64_t box_width) {
    return make_tensor_map(map, std::is_same_v<S, __half>, rows, shape.batch, shape.heads, height, width,
                           shape.head_dim, static_cast<int>(box_height), static_cast<int>(box_width));
}
inline Rows whole_rows(const Shape& shape, const void* data, int64_t count) {
    const int64_t stride = count * shape.head_dim;
    return Rows{const_cast<void*>(data), shape.heads * stride, stride, shape.head_dim, 1};
}
template <class S>
bool make_landmark_map(CUtensorMap& map, const AttentionParams& p, const void* data, int box_rows) {
    return p.num_landmarks == 0 || make_map<S>(map, p.shape, whole_rows(p.shape, data, p.num_landmarks), 1,
                                               p.num_landmarks, 1, box_rows);
}

// Where a role stands in a ring of slots. It waits for every phase of those slots that it uses, as only the
// parity of phases tells them apart.
struct RingCursor {
    int slot = 0;
    uint32_t phase = 0;

    __device__ void advance(int slots, int by = 1) {
        slot += by;
        if (slot < slots) return;
        slot -= slots;
        phase ^= 1;
    }
};

// How persistent CTAs share the windows of all sequences, which are numbered by head, then batch, then
// position. CTAs side by side take the same windows of all heads, as these lie side by side in memory, and
// all go along the tokens together, with runs of a few windows in turn; where heads or runs would be shared
// unevenly, each has windows one after the other.
struct WindowShares {
    int of_head;     // windows of a head
    int heads;       // that are taken side by side, or 1
    int parts;       // of such a head's windows, or of all: each a CTA's
    int run;         // windows of a run, all of one sequence
    int share, rest; // runs of a part, and what is left over
    int stride;      // windows from the beginning of a CTA's run to that of its next one; 1: not in turn
    bool apart;      // heads have CTAs of their own
    struct Jump {
        int batches, rows, columns;
    } jump; // from the last window of a CTA's run to the first of its next one

    static WindowShares of(const Shape& shape, int64_t rows, int64_t columns) {
        const int64_t of_sequence = rows * columns, of_head = shape.batch * of_sequence,
                      all = shape.heads * of_head;
        const int64_t ctas = detail::min(all, multiprocessors()), least = detail::ceil_div(all, ctas);
        int64_t heads = shape.heads, parts = detail::min(ctas / heads, of_head);
        // The most windows of a CTA are within a twentieth of the least.
        const auto is_even = [&](int64_t run) {
            return 20 * run * detail::ceil_div(of_head / run, parts) <= 21 * least;
        };
        const bool apart = parts > 0 && is_even(1);
        if (!apart) heads = 1, parts = ctas;
        // A CTA meets a sequence's landmarks with four windows at least, or with as many as come out even.
        bool in_turn = apart && 4 * parts <= of_sequence;
        int64_t run = 1;
        for (int64_t i = 4; apart && !in_turn && i > 0; --i)
            if (of_sequence % i == 0 && i * parts >= of_sequence + i && i * parts <= of_head && is_even(i))
                in_turn = true, run = i;
        const int64_t runs = (apart ? of_head : all) / run, stride = in_turn ? parts * run : 1,
                      jump = stride - run + 1;
        return WindowShares{
            .of_head = static_cast<int>(of_head),
            .heads = static_cast<int>(heads),
            .parts = static_cast<int>(parts),
            .run = static_cast<int>(run),
            .share = static_cast<int>(runs / parts),
            .rest = static_cast<int>(runs % parts),
            .stride = static_cast<int>(stride),
            .apart = apart,
            .jump = {static_cast<int>(jump / of_sequence), static_cast<int>(jump % of_sequence / columns),
                     static_cast<int>(jump % columns)},
        };
    }
    int ctas() const { return heads * parts; }
    // CTAs that have windows of one head, at most.
    int most_of_head() const { return apart ? parts : detail::min(of_head, of_head / share + 2); }

    __device__ int begin(int cta) const {
        const int part = cta / heads;
        return cta % heads * of_head + (in_turn() ? part * run : first_of(part));
    }
    __device__ int count(int cta) const {
        const int part = cta / heads;
        return in_turn() ? run * (share + (part < rest)) : first_of(part + 1) - first_of(part);
    }
    // From the i-th window of a CTA, with which it enters a sequence, to that with which it enters the next.
    __device__ int next_sequence(int i, int begin, int of_sequence) const {
        if (jump.batches > 0) return i + run;
        const int ahead = of_sequence - (begin + i / run * stride) % of_sequence;
        return i + (ahead + stride - 1) / stride * run;
    }
    // Parts that have windows of a head: from the first one to the last.
    __device__ int first_part(int head) const { return apart ? 0 : part_of(head * of_head); }
    __device__ int last_part(int head) const { return apart ? parts - 1 : part_of((head + 1) * of_head - 1); }

  private:
    __device__ bool in_turn() const { return stride > 1; }
    __device__ int first_of(int part) const { return part * share + part * rest / parts; }
    __device__ int part_of(int window) const {
        int part = window / (share + 1); // or behind it
        while (first_of(part + 1) <= window) ++part;
        return part;
    }
};

// Goes through a CTA's windows, and enters every sequence on its way.
struct WindowCursor {
    int head, batch, row, column;
    int left; // with this one
    bool enters_sequence;
    int left_of_run;

    template <class Plan>
    __device__ static WindowCursor first(const Plan& plan) {
        const int begin = plan.shares.begin(blockIdx.x);
        const int sequence = begin / plan.windows.num_windows, window = begin % plan.windows.num_windows;
        return WindowCursor{
            .head = sequence / plan.batch,
            .batch = sequence % plan.batch,
            .row = window / plan.windows.columns,
            .column = window % plan.windows.columns,
            .left = plan.shares.count(blockIdx.x),
            .enters_sequence = true,
            .left_of_run = plan.shares.run,
        };
    }
    template <class Plan>
    __device__ void advance(const Plan& plan) {
        --left;
        if (--left_of_run > 0) return go(plan, {0, 0, 1});
        left_of_run = plan.shares.run;
        go(plan, plan.shares.jump);
    }

  private:
    template <class Plan>
    __device__ void go(const Plan& plan, const WindowShares::Jump& jump) {
        column += jump.columns;
        const bool next_row = column >= plan.windows.columns;
        if (next_row) column -= plan.windows.columns;
        row += jump.rows + next_row;
        const bool next_batch = row >= plan.rows;
        if (next_batch) row -= plan.rows;
        const int batches = jump.batches + next_batch;
        enters_sequence = batches > 0;
        batch += batches;
        if (batch < plan.batch) return;
        batch -= plan.batch;
        ++head;
    }
};

} // namespace eva_attn::cuda::mma
