// Kernels for AVX-512 (F, BW, DQ, VL).
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "kernels/cpu/params.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace eva_attn::cpu::avx512 {
#define EVA_VECTOR_BYTES 64
#define EVA_VECTOR_COLUMNS 4
#include "kernels/cpu/table.h"

} // namespace eva_attn::cpu::avx512
#pragma GCC pop_options
#endif
