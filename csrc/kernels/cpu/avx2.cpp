// Kernels for AVX2 with FMA.
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "kernels/cpu/params.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace eva_attn::cpu::avx2 {
#define EVA_VECTOR_BYTES 32
#define EVA_VECTOR_COLUMNS 2
#include "kernels/cpu/table.h"

} // namespace eva_attn::cpu::avx2
#pragma GCC pop_options
#endif
