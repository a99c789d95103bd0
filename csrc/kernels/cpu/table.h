// All kernels of one instruction set: included once by each translation unit, behind its target pragma,
// inside the set's namespace and with EVA_VECTOR_BYTES and EVA_VECTOR_COLUMNS defined.

namespace {

// clang-format off: each builds on the one before
#include "kernels/cpu/simd.h"
#include "kernels/cpu/chunk_summary.h"
#include "kernels/cpu/decode_step.h"
#include "kernels/cpu/window_attention.h"
// clang-format on

template <class S, class T>
constexpr Kernels make_table() {
    return Kernels{
        .summary_scratch = summary_scratch<S, T>,
        .chunk_summary_fwd = chunk_summary_fwd<S, T>,
        .chunk_summary_bwd = chunk_summary_bwd<S, T>,
        .chunk_terms = chunk_terms<S, T>,
        .terms_scratch = terms_scratch<S, T>,
        .weight_grad = weight_grad<T>,
        .attention_scratch = attention_scratch<S, T>,
        .window_attention_fwd = window_attention_fwd<S, T>,
        .window_attention_bwd = window_attention_bwd<S, T>,
        .prefix_scratch = prefix_scratch<S, T>,
        .prefix_attention_fwd = prefix_attention_fwd<S, T>,
        .prefix_attention_bwd = prefix_attention_bwd<S, T>,
        .decode_scratch = decode_scratch<S, T>,
        .decode_step = decode_step<S, T>,
    };
}

constexpr Kernels kFloatTable = make_table<float, float>();
constexpr Kernels kDoubleTable = make_table<double, double>();
constexpr Kernels kBFloat16Table = make_table<BFloat16, float>();
constexpr Kernels kHalfTable = make_table<Half, float>();

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
