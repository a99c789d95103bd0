// What an op was called with, its options gathered by meaning.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <optional>
#include <tuple>
#include <utility>

#include "kernels/geometry.h"

namespace eva_attn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using SymGeometry = BasicGeometry<c10::SymInt>;

namespace detail {
template <size_t... I>
auto tensors(std::index_sequence<I...>) -> std::tuple<decltype((void)I, Tensor())...>;
}
// A tuple of n tensors.
template <size_t n>
using Tensors = decltype(detail::tensors(std::make_index_sequence<n>()));

struct ProjectionWeights {
    OptionalTensor weight;      // [D, D]
    OptionalTensor bias;        // [D]
    OptionalTensor norm_weight; // [D]
    OptionalTensor norm_bias;   // [D]
};

struct SummaryOptions {
    ProjectionWeights key, query;
    OptionalTensor noise; // [B, H, C, D]
    double norm_eps = 0;
    c10::SymInt mean_divisor = 0;
    bool tangent = false; // no projections: landmarks are tangents at the mean queries
};

struct AttentionOptions {
    OptionalTensor relative_bias; // [H or 1, bias_height, bias_width]
    OptionalTensor landmark_bias; // [B, C]
    OptionalTensor dropout_seed;  // int64 scalar
    double dropout_p = 0;
    bool exclude_window_landmarks = false;
    OptionalTensor landmark_entropy{}; // [B, H, C]
};

struct Call {
    SymGeometry geometry;
    OptionalTensor key_padding_mask{}; // bool [B, N]
    std::optional<double> scale{};
    SummaryOptions summary{};
    AttentionOptions attention{};
    Tensor query{}, key{}, value{};                  // [B, H, N, D]
    OptionalTensor landmark_key{}, landmark_value{}; // [B, H, C, D], inputs of window_attention
};

} // namespace eva_attn
