// Kernels for what every machine has (128-bit vectors: SSE2, NEON).
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "kernels/cpu/params.h"

namespace eva_attn::cpu::baseline {
namespace {

#define EVA_VECTOR_BYTES 16
#define EVA_VECTOR_COLUMNS 2
#include "kernels/cpu/simd.h"
// The order matters: each builds on the one before.
#include "kernels/cpu/chunk_summary.h"
#include "kernels/cpu/window_attention.h"
// Last.
#include "kernels/cpu/table.h"

} // namespace

const Kernels& table(DType dtype) {
    switch (dtype) {
    case DType::kDouble:
        return kDoubleTable;
    case DType::kBFloat16:
        return kBFloat16Table;
    case DType::kHalf:
        return kHalfTable;
    default:
        return kFloatTable;
    }
}

} // namespace eva_attn::cpu::baseline
