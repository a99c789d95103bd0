// Thin wrappers of Hopper's asynchronous matrix products of a warpgroup (sm_90a).
#pragma once

#include <type_traits>

#include "kernels/cuda/ptx.cuh"

namespace eva_attn::cuda {

// Makes ordinary writes to shared memory, cp.async's too, visible to these products; a barrier must follow.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ inline void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until at most `kPending` of the latest groups are under way.
template <int kPending = 0>
__device__ inline void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Moves registers between warpgroups: how many each thread has from here on.
template <int kRegisters>
__device__ inline void warpgroup_take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void warpgroup_give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Keeps the compiler from using accumulators before the wait.
template <int kTiles>
__device__ inline void fence_registers(float (&c)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}

// Of a tile of rows of 128 bytes, 16-byte units permuted by the row modulo 8; 1024-byte aligned.
__device__ inline uint64_t tile_descriptor(const void* tile) {
    const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
    constexpr uint64_t kLeading = 1, kEightRows = 1024 >> 4, kSwizzle128 = 1;
    return address | kLeading << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// clang-format off
#define EVA_WGMMA_OUT \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define EVA_WGMMA_ROW(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define EVA_WGMMA_ROWS \
    EVA_WGMMA_ROW(0), EVA_WGMMA_ROW(1), EVA_WGMMA_ROW(2), EVA_WGMMA_ROW(3), \
    EVA_WGMMA_ROW(4), EVA_WGMMA_ROW(5), EVA_WGMMA_ROW(6), EVA_WGMMA_ROW(7)
#define EVA_WGMMA_SHARED(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " EVA_WGMMA_OUT \
                 ", %32, %33, p, 1, 1, %35, %36;\n}\n" \
                 : EVA_WGMMA_ROWS : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))
#define EVA_WGMMA_REGISTERS(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " EVA_WGMMA_OUT \
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n" \
                 : EVA_WGMMA_ROWS \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB))
#define EVA_WGMMA_SHARED_56(type) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %30, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n56k16.f32." type "." type \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27}" \
                 ", %28, %29, p, 1, 1, %31, %32;\n}\n" \
                 : EVA_WGMMA_ROW(0), EVA_WGMMA_ROW(1), EVA_WGMMA_ROW(2), EVA_WGMMA_ROW(3), \
                   EVA_WGMMA_ROW(4), EVA_WGMMA_ROW(5), EVA_WGMMA_ROW(6) \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))
// clang-format on

// C [64, 64] (+)= A [64, 16] B [16, 64]: warp w holds rows 16 w onward of C (and of A), as multiply_add does.
// Descriptors: A by rows, B by columns, unless transposed.
template <class S, int kTransposeA, int kTransposeB>
__device__ inline void warpgroup_multiply(float (&c)[8][4], uint64_t a, uint64_t b, int accumulate) {
    if constexpr (std::is_same_v<S, __half>) {
        EVA_WGMMA_SHARED("f16");
    } else {
        EVA_WGMMA_SHARED("bf16");
    }
}
// C [64, 56].
template <class S, int kTransposeA, int kTransposeB>
__device__ inline void warpgroup_multiply(float (&c)[7][4], uint64_t a, uint64_t b, int accumulate) {
    if constexpr (std::is_same_v<S, __half>) {
        EVA_WGMMA_SHARED_56("f16");
    } else {
        EVA_WGMMA_SHARED_56("bf16");
    }
}
template <class S, int kTransposeB>
__device__ inline void warpgroup_multiply(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b,
                                          int accumulate) {
    if constexpr (std::is_same_v<S, __half>) {
        EVA_WGMMA_REGISTERS("f16");
    } else {
        EVA_WGMMA_REGISTERS("bf16");
    }
}

#undef EVA_WGMMA_REGISTERS
#undef EVA_WGMMA_SHARED
#undef EVA_WGMMA_ROWS
#undef EVA_WGMMA_ROW
#undef EVA_WGMMA_OUT

} // namespace eva_attn::cuda
