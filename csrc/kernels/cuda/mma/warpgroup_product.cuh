// Products of a warpgroup with tiles in shared memory, asynchronous: a fence before, a commit and a wait
// after them are the caller's.
#pragma once

#include "kernels/cuda/mma/tile.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace eva_attn::cuda::mma {

constexpr int kTileRows = 64;

// 64 rows, in panels of 64 columns.
template <class S, int kHeadDim>
struct WarpgroupTile {
    static constexpr int kPanels = kHeadDim / 64;
    alignas(1024) S panel[kPanels][kTileRows * 64];

    // Eight columns of a panel.
    __device__ const S* unit(int panel_index, int row, int unit) const {
        return Tile<S, 64>{const_cast<S*>(panel[panel_index])}.unit(row, unit);
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

// c += a b, of an `a` in registers.
template <class S, int kHeadDim>
__device__ inline void begin_product(float (&c)[kHeadDim / 8][4], const uint32_t (&a)[kTileRows / 16][4],
                                     const WarpgroupTile<S, kHeadDim>& b) {
#pragma unroll
    for (int k = 0; k < kTileRows / 16; ++k)
#pragma unroll
        for (int panel = 0; panel < kHeadDim / 64; ++panel)
            warpgroup_multiply<S, 1>(panel_of(c, panel), a[k], tile_descriptor(b.panel[panel]) + k * 128, 1);
}

} // namespace eva_attn::cuda::mma
