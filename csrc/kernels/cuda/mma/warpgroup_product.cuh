// Products of a warpgroup with tiles in shared memory, asynchronous: a fence before, a commit and a wait
// after them are the caller's.
#pragma once

#include "kernels/cuda/mma/window_tile.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace eva_attn::cuda::mma {

constexpr int kTileRows = 64;

// Rows in panels of 64 columns.
template <class S, int kHeadDim, int kRows = kTileRows>
struct WarpgroupTile {
    static constexpr int kPanels = kHeadDim / 64;
    alignas(1024) S panel[kPanels][kRows * 64];

    __device__ Tile<S, 64> tile(int panel_index) const {
        return Tile<S, 64>{const_cast<S*>(panel[panel_index])};
    }
    // Eight columns of a panel.
    __device__ const S* unit(int panel_index, int row, int unit) const {
        return tile(panel_index).unit(row, unit);
    }
};

// The 64 columns of a panel in a result of more.
template <int kTiles>
__device__ inline float (&panel_of(float (&c)[kTiles][4], int panel))[8][4] {
    return reinterpret_cast<float (&)[8][4]>(c[8 * panel]);
}

// c = a b^T.
template <class S, int kHeadDim>
__device__ inline void begin_transposed_product(float (&c)[kTileRows / 8][4],
                                                const WarpgroupTile<S, kHeadDim>& a,
                                                const WarpgroupTile<S, kHeadDim>& b) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d)
        warpgroup_multiply<S, 0, 0>(c, tile_descriptor(a.panel[d / 4]) + d % 4 * 2,
                                    tile_descriptor(b.panel[d / 4]) + d % 4 * 2, d > 0);
}

// c += a b, of an `a` in registers: the steps [kFrom, kTo) of sixteen columns of it.
template <int kFrom, int kTo, class S, int kHeadDim, int kSteps>
__device__ inline void begin_steps(float (&c)[kHeadDim / 8][4], const uint32_t (&a)[kSteps][4],
                                   const WarpgroupTile<S, kHeadDim, 16 * kSteps>& b) {
#pragma unroll
    for (int k = kFrom; k < kTo; ++k)
#pragma unroll
        for (int panel = 0; panel < kHeadDim / 64; ++panel)
            warpgroup_multiply<S, 1>(panel_of(c, panel), a[k], tile_descriptor(b.panel[panel]) + k * 128, 1);
}
template <class S, int kHeadDim, int kSteps>
__device__ inline void begin_product(float (&c)[kHeadDim / 8][4], const uint32_t (&a)[kSteps][4],
                                     const WarpgroupTile<S, kHeadDim, 16 * kSteps>& b) {
    begin_steps<0, kSteps>(c, a, b);
}

// Such an `a` that is zeros but for x[r] in column[r] of the thread's two rows, where that is among its
// columns.
template <class S, int kSteps>
__device__ inline void make_one_hot(uint32_t (&a)[kSteps][4], const int (&column)[2], const float (&x)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const uint32_t pair = column[r] % 2 ? pack<S>(0, x[r]) : pack<S>(x[r], 0);
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
            uint32_t& to = a[i / 2][i % 2 * 2 + r];
            to = (column[r] & ~1) == 8 * i + score_column() ? pair : 0;
            asm volatile("" : "+r"(to)::"memory"); // not to be computed between products
        }
    }
}

} // namespace eva_attn::cuda::mma
