// Thin wrappers of the instructions that the tensor-core kernels are made of (sm_80 upward).
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace eva_attn::cuda {

__device__ inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory; zeros where `index` is negative, and nothing is read then.
__device__ inline void copy_async_at(int index, void* shared, const void* global) {
    asm volatile("{\n"
                 ".reg .pred ignored;\n"
                 "setp.lt.s32 ignored, %2, 0;\n"
                 "cp.async.cg.shared.global [%0], [%1], 16, ignored;\n"
                 "}\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(index)
                 : "memory");
}
__device__ inline void copy_async(void* shared, const void* global, bool valid = true) {
    copy_async_at(valid ? 0 : -1, shared, global);
}
// The same from the `index`-th row of `stride` bytes, to a shared address.
__device__ inline void copy_async_row(int index, int stride, uint32_t shared, const void* global) {
    asm volatile("{\n"
                 ".reg .pred ignored;\n"
                 ".reg .b64 from;\n"
                 "setp.lt.s32 ignored, %1, 0;\n"
                 "mad.wide.s32 from, %1, %2, %3;\n"
                 "cp.async.cg.shared.global [%0], [from], 16, ignored;\n"
                 "}\n" ::"r"(shared),
                 "r"(index), "r"(stride), "l"(global)
                 : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `kPending` of the latest groups are under way.
template <int kPending>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Among `threads` of a block, whole warps that no other barrier has the number of.
__device__ inline void sync_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// Begins to bring 32 bytes into the L2 cache.
__device__ inline void prefetch(const void* global) {
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global));
}

// 16 bytes that are read once; zeros where `valid` is false, and nothing is read then.
__device__ inline uint4 load_streaming(const void* global, bool valid) {
    uint4 x;
    asm volatile("{\n"
                 ".reg .pred valid;\n"
                 "setp.ne.s32 valid, %5, 0;\n"
                 "mov.b32 %0, 0;\n"
                 "mov.b32 %1, 0;\n"
                 "mov.b32 %2, 0;\n"
                 "mov.b32 %3, 0;\n"
                 "@valid ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 "}\n"
                 : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
                 : "l"(global), "r"(static_cast<int>(valid)));
    return x;
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the shared address of row i % 8 of matrix i / 8.
__device__ inline void load_matrix(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ inline void load_matrix(uint32_t (&r)[4], const void* row) { load_matrix(r, shared_address(row)); }
__device__ inline void load_matrix_transposed(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ inline void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
    load_matrix_transposed(r, shared_address(row));
}

// And back to shared memory, at a shared address (sm_90 upward).
__device__ inline void store_matrix(uint32_t row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// C [16, 8] += A [16, 16] B [16, 8] in float. With group = lane / 4 and pair = 2 * (lane % 4), a lane holds
// A rows group and group + 8 (a[0], a[1]: columns pair, pair + 1; a[2], a[3]: 8 further),
// B rows pair, pair + 1 (b[0]) and 8 further (b[1]) of column group,
// C rows group (c[0], c[1]) and group + 8 (c[2], c[3]) of columns pair, pair + 1.
template <class S>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C [16, 8] += A [16, 8] B [8, 8], likewise of the first 8 columns of A and rows of B alone.
template <class S>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[2], uint32_t b);
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, "
        "%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}
template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, "
        "%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Two floats as a pair of S, the first in the lower half.
template <class S>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <class S>
__device__ inline float2 unpack(uint32_t pair);
template <>
__device__ inline float2 unpack<__nv_bfloat16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ inline float2 unpack<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

} // namespace eva_attn::cuda
