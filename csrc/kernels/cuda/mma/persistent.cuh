// How the warps of a persistent block, each with a part of its own, go through windows and slots of tiles.
#pragma once

#include <cuda_fp16.h>
#include <type_traits>

#include "kernels/cuda/mma/windows.cuh"
#include "kernels/cuda/tma.cuh"

namespace eva_attn::cuda::mma {

constexpr int kWarpgroupSize = 128;

// Barriers 1 onward belong to the warpgroups.
__device__ inline void warpgroup_sync(int warpgroup) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(1 + warpgroup), "n"(kWarpgroupSize) : "memory");
}
// One arrival, when the whole warp is done.
__device__ inline void release(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) barrier_arrive(barrier);
}

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
// position. CTAs side by side take the same windows of all heads, as these lie side by side in memory, and in
// a long sequence all CTAs go along it together; where heads would share unevenly, each has windows one after
// the other.
struct WindowShares {
    int of_head;     // windows of a head
    int heads;       // that are taken side by side, or 1
    int parts;       // of such a head's windows, or of all: each a CTA's
    int share, rest; // windows of a part, and what is left over
    int step;        // from a CTA's window to its next one
    bool apart;      // heads have CTAs of their own

    static WindowShares of(const Shape& shape, int64_t windows_of_sequence) {
        const int64_t of_head = shape.batch * windows_of_sequence, all = shape.heads * of_head;
        const int64_t ctas = detail::min(all, multiprocessors());
        int64_t heads = shape.heads, parts = detail::min(ctas / heads, of_head);
        const bool apart = // within a twentieth of the least
            parts > 0 && 20 * detail::ceil_div(of_head, parts) <= 21 * detail::ceil_div(all, ctas);
        if (!apart) heads = 1, parts = ctas;
        const int64_t windows = apart ? of_head : all;
        // A CTA then meets a sequence's landmarks with four windows at least.
        const bool together = apart && 4 * parts <= windows_of_sequence;
        return WindowShares{
            .of_head = static_cast<int>(of_head),
            .heads = static_cast<int>(heads),
            .parts = static_cast<int>(parts),
            .share = static_cast<int>(windows / parts),
            .rest = static_cast<int>(windows % parts),
            .step = together ? static_cast<int>(parts) : 1,
            .apart = apart,
        };
    }
    int ctas() const { return heads * parts; }
    // CTAs that have windows of one head, at most.
    int most_of_head() const { return apart ? parts : detail::min(of_head, of_head / share + 2); }

    __device__ int begin(int cta) const {
        const int part = cta / heads;
        return cta % heads * of_head + (step > 1 ? part : first_of(part));
    }
    __device__ int count(int cta) const {
        const int part = cta / heads;
        return step > 1 ? share + (part < rest) : first_of(part + 1) - first_of(part);
    }
    // Parts that have windows of a head: from the first one to the last.
    __device__ int first_part(int head) const { return apart ? 0 : part_of(head * of_head); }
    __device__ int last_part(int head) const { return apart ? parts - 1 : part_of((head + 1) * of_head - 1); }

  private:
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
    int left;
    bool enters_sequence;

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
        };
    }
    template <class Plan>
    __device__ void advance(const Plan& plan) {
        --left;
        enters_sequence = false;
        column += plan.shares.step;
        while (column >= plan.windows.columns) {
            column -= plan.windows.columns;
            if (++row < plan.rows) continue;
            row = 0;
            enters_sequence = true;
            if (++batch < plan.batch) continue;
            batch = 0;
            ++head;
        }
    }
};

} // namespace eva_attn::cuda::mma
