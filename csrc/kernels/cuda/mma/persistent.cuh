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

// Windows are numbered by head, then batch, then position: a CTA's share of them changes its head rarely.
struct WindowCursor {
    int head, batch, row, column;
    int left; // in this CTA's share

    template <class Plan>
    __device__ static WindowCursor first(const Plan& plan) {
        const auto begin = static_cast<int>(blockIdx.x * plan.num_windows / gridDim.x);
        const auto end = static_cast<int>((blockIdx.x + 1) * plan.num_windows / gridDim.x);
        return at(plan, begin, end - begin);
    }
    template <class Plan>
    __device__ static WindowCursor at(const Plan& plan, int begin, int left) {
        const int sequence = begin / plan.windows.num_windows, window = begin % plan.windows.num_windows;
        return WindowCursor{
            .head = sequence / plan.batch,
            .batch = sequence % plan.batch,
            .row = window / plan.windows.columns,
            .column = window % plan.windows.columns,
            .left = left,
        };
    }
    __device__ bool begins_sequence() const { return row == 0 && column == 0; }
    template <class Plan>
    __device__ void advance(const Plan& plan) {
        --left;
        if (++column < plan.windows.columns) return;
        column = 0;
        if (++row < plan.rows) return;
        row = 0;
        if (++batch < plan.batch) return;
        batch = 0;
        ++head;
    }
};

} // namespace eva_attn::cuda::mma
