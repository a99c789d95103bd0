// Kernels for what every machine has (128-bit vectors: SSE2, NEON).
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "kernels/cpu/params.h"

namespace eva_attn::cpu::baseline {
#define EVA_VECTOR_BYTES 16
#define EVA_VECTOR_COLUMNS 2
#include "kernels/cpu/table.h"

} // namespace eva_attn::cpu::baseline
